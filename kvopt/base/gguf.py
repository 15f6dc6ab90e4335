"""GGUF files: dequantised once to a folder with bf16 safetensors and a tokenizer, because loading GGUF directly takes
many times longer.

One tensor after the other goes from file to file: the model is never whole in memory, but for the experts of mixtures,
which transformers puts together from several tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvopt.errors import InputError, counted, missing_extra
from kvopt.storage.files import replacing_directory, write_json

ROPE_FREQS = "rope_freqs.weight"
"""Divisors of the rotary frequencies, which converters write in place of a rule (Llama 3.1 and later)."""
WEIGHTS = "model.safetensors"


def save_gguf_as_folder(file: Path, folder: Path, source: dict[str, str]) -> None:
    """Write ``file`` as an ordinary model folder: bf16 safetensors, config, generation config, tokenizer with its
    chat template. ``source`` is kept as ``source.json``. ``folder`` appears complete or not at all.

    transformers leaves ``rope_freqs`` out; its divisors are put into the configuration here.

    Raises InputError for what transformers cannot read, for tensors of the file that it leaves out, and for tensors of
    the model that the file lacks.
    """
    if find_spec("gguf") is None:
        raise missing_extra("gguf", "reading a .gguf file", str(file))
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        read = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        settings, reader = read.to_dict(), GGUFReader(str(file))
        divisors = next((tensor.data for tensor in reader.tensors if tensor.name == ROPE_FREQS), None)
        if divisors is not None:
            _scale_rope(read, [float(value) for value in divisors])
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(type(read)(**_portable(read)), dtype=torch.bfloat16)
        with replacing_directory(folder) as temporary:
            _write_weights(temporary / WEIGHTS, model, _tensors(reader, model, settings, file), file)
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(temporary)
            if model.generation_config is not None:
                model.generation_config.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            for part in temporary.iterdir():
                part.chmod(0o644)
            write_json(temporary / "source.json", source)
    except (OSError, ValueError, KeyError, NotImplementedError, RuntimeError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"cannot be read as a GGUF model: {reason}", where=str(file)) from error


def _tensors(reader: Any, model: Any, settings: dict[str, Any], file: Path) -> Iterator[tuple[str, Tensor]]:
    """The file's tensors by their names in the model, dequantised, each made when it is asked for. Raises InputError
    for tensors that the model has no place for: it would be another model.
    """
    import gguf
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        read_field,
    )

    processor = TENSOR_PROCESSORS.get(read_field(reader, "general.architecture")[0], TensorProcessor)(config=settings)
    names = get_gguf_hf_weights_map(model, processor)
    joined: dict[str, Tensor] = {}  # what the processor puts together of several
    unused = []
    for tensor in reader.tensors:
        if tensor.name == ROPE_FREQS:
            continue
        weights = gguf.dequantize(tensor.data, tensor.tensor_type)
        parsed = {"tensors": joined}
        done = processor.process(weights=weights, name=tensor.name, tensor_key_mapping=names, parsed_parameters=parsed)
        if done.name in names:
            yield names[done.name], torch.from_numpy(done.weights.copy())
        elif done.name is not None:
            unused.append(tensor.name)
        del weights, done  # before the next one is made
    yield from joined.items()
    if unused:
        raise InputError(
            f"transformers does not use {counted(len(unused), 'tensor')} of it, first {min(unused)}",
            where=str(file),
            fix="use the model folder that it was converted from",
        )


def _write_weights(path: Path, model: Any, tensors: Iterator[tuple[str, Tensor]], file: Path) -> None:
    """The model's weights in bf16, as ``save_pretrained`` would write them: a safetensors file whose header follows
    from the model's shapes, filled in the order in which the tensors come. Raises InputError for those that are
    missing.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    shapes = {name: tuple(t.shape) for name, t in sorted(model.state_dict().items()) if name not in tied}
    places, end = {}, 0
    for name, shape in shapes.items():
        places[name] = end, (end := end + 2 * math.prod(shape))
    entries = {
        name: {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": list(place)}
        for name, place in places.items()
    }
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    missing = set(shapes)
    with path.open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        start = out.tell()
        out.truncate(start + end)
        for name, tensor in tensors:
            if name not in places:
                continue  # the second name of a tied one
            if tuple(tensor.shape) != shapes[name]:
                raise ValueError(f"{name} has shape {list(tensor.shape)}, not {list(shapes[name])}")
            out.seek(start + places[name][0])
            out.write(tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
            missing.discard(name)
    if missing:
        raise InputError(f"lacks {counted(len(missing), 'tensor')}, first {min(missing)}", where=str(file))


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
