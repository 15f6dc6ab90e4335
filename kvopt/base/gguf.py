"""GGUF files: dequantised once to a folder with bf16 safetensors and a tokenizer, because loading GGUF directly takes
many times longer."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvopt.errors import InputError, missing_extra
from kvopt.storage.files import replacing_directory, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read_gguf(file: Path) -> tuple[PreTrainedModel, Any]:
    """The model of a GGUF file in float32, dequantised, and its tokenizer. Raises InputError for what transformers
    cannot read."""
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
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"cannot be read as a GGUF model: {reason}", where=str(file)) from error
    if info["missing_keys"]:
        raise InputError(
            f"lacks {len(info['missing_keys'])} tensors, first {min(info['missing_keys'])}", where=str(file)
        )
    return model, tokenizer


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
