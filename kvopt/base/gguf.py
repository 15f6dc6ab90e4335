"""GGUF files: dequantised once to a folder with bf16 safetensors and a tokenizer, because loading GGUF directly takes
many times longer."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvopt.errors import InputError, counted, missing_extra
from kvopt.storage.files import replacing_directory, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel


ROPE_FREQS = "rope_freqs.weight"
"""Divisors of the rotary frequencies, which converters write in place of a rule (Llama 3.1 and later)."""


def read_gguf(file: Path) -> tuple[PreTrainedModel, Any]:
    """The model of a GGUF file in float32, dequantised, and its tokenizer. Raises InputError for what transformers
    cannot read, and for tensors of the file that it leaves out.

    transformers leaves ``rope_freqs`` out; its divisors are put into the configuration here, which the model that
    :func:`save_gguf_as_folder` builds follows.
    """
    if find_spec("gguf") is None:
        raise missing_extra("gguf", "reading a .gguf file", str(file))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": file.name, "dtype": torch.float32, "output_loading_info": True}
    try:  # newer transformers may keep the weights packed unless told otherwise
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
    except ImportError:
        pass
    try:
        model, info = AutoModelForCausalLM.from_pretrained(str(file.parent), **options)
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    except (OSError, ValueError, KeyError, NotImplementedError, RuntimeError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"cannot be read as a GGUF model: {reason}", where=str(file)) from error
    if info["missing_keys"]:
        raise InputError(
            f"lacks {len(info['missing_keys'])} tensors, first {min(info['missing_keys'])}", where=str(file)
        )
    _check_all_used(file, model)
    return model, tokenizer


def _check_all_used(file: Path, model: Any) -> None:
    """Raises InputError for tensors of the file that are in no parameter of the model: it would be another model."""
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    tensors = {tensor.name: tensor for tensor in GGUFReader(str(file)).tensors}
    if (divisors := tensors.pop(ROPE_FREQS, None)) is not None:
        _scale_rope(model.config, [float(value) for value in divisors.data])
    parameters = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}
    if sum(int(tensor.n_elements) for tensor in tensors.values()) == sum(parameters.values()):
        return
    processor = TENSOR_PROCESSORS.get(model.config.model_type, TensorProcessor)(config=model.config.to_dict())
    unused = sorted(tensors.keys() - get_gguf_hf_weights_map(model, processor).keys())
    if unused:
        raise InputError(
            f"transformers does not use {counted(len(unused), 'tensor')} of it, first {unused[0]}",
            where=str(file),
            fix="use the model folder that it was converted from",
        )


def _scale_rope(config: Any, divisors: list[float]) -> None:
    """Divide the rotary frequencies of a configuration. ``longrope`` is the rule of transformers that takes the
    divisors as a list; with its two lists equal and no scaling of attention it is nothing but them.
    """
    positions = config.max_position_embeddings
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": config.rope_parameters["rope_theta"],
        "short_factor": divisors,
        "long_factor": divisors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": positions,
    }


def save_gguf_as_folder(file: Path, folder: Path, source: dict[str, str]) -> None:
    """Write ``file`` as an ordinary model folder: bf16 safetensors, config, generation config, tokenizer with its
    chat template.

    The model is built anew from its configuration and filled with the dequantised weights, because a model that was
    loaded from GGUF refuses to be saved. ``source`` is kept as ``source.json``. ``folder`` appears complete or not at
    all.
    """
    from transformers import AutoModelForCausalLM

    loaded, tokenizer = read_gguf(file)
    config = type(loaded.config)(**_portable(loaded.config))
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    fresh.load_state_dict(
        {name: tensor.to(torch.bfloat16) for name, tensor in loaded.state_dict().items()}, strict=True
    )
    fresh.tie_weights()
    if loaded.generation_config is not None:
        fresh.generation_config = loaded.generation_config
    with replacing_directory(folder) as temporary:
        fresh.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for part in temporary.iterdir():
            part.chmod(0o644)
        write_json(temporary / "source.json", source)


def _portable(config: Any) -> dict[str, Any]:
    """The configuration without what describes the file it came from."""
    values = config.to_diff_dict()
    for key in (
        "quantization_config",
        "_name_or_path",
        "_model_name_or_path",
        "transformers_version",
        "dtype",
        "model_type",
    ):
        values.pop(key, None)
    values["architectures"] = None
    return values
