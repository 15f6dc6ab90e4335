"""The files of a PEFT adapter that is a context, read and checked without a base: its config, its one tensor, and
kvopt's own record beside them.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvopt.documents.context_record import ContextRecord
from kvopt.documents.validated import read_record_of
from kvopt.errors import InputError
from kvopt.storage.files import read_json

FORMAT_VERSION = 1
RECORD = "kvopt.json"
STUDENT = "kvopt-student.json"
TENSOR = "prompt_embeddings"
KV_TYPES = ("CARTRIDGE", "PREFIX_TUNING")
TYPES = (*KV_TYPES, "PROMPT_TUNING")

_TEXT_TASKS = (None, "CAUSAL_LM")
_COUNTS = ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim", "num_frozen_tokens")


def kind_of(config: dict[str, Any]) -> Literal["kv", "soft"]:
    """kv or soft, by the adapter's PEFT type."""
    return "kv" if config["peft_type"] in KV_TYPES else "soft"


def read_record(folder: Path) -> ContextRecord | None:
    """``kvopt.json`` of a context folder, None where there is none. Raises InputError for a damaged or newer one."""
    return read_record_of(ContextRecord, folder / RECORD, FORMAT_VERSION)


def adapter_config(folder: Path) -> dict[str, Any]:
    """The PEFT config of a context folder. Raises InputError for a folder that is no context, with the reason."""
    path = folder / "adapter_config.json"
    if not folder.is_dir() or not path.is_file():
        raise InputError(
            "is not a context folder",
            where=str(folder),
            fix="it has no adapter_config.json; give a folder from contexts/",
        )
    config = read_json(path)
    peft_type = config.get("peft_type")
    if peft_type not in TYPES:
        student = (folder / STUDENT).is_file()
        raise InputError(
            "is a student, not a context" if student else f"a PEFT adapter of type {peft_type} is not a context",
            where=str(folder),
            fix="CARTRIDGE, PREFIX_TUNING or PROMPT_TUNING is",
        )
    if config.get("prefix_projection"):
        raise InputError(
            "PREFIX_TUNING with a projection (prefix_projection: true) is not a KV cache",
            where=str(folder),
            fix="train it without a projection",
        )
    _check_decoder(config, folder)
    _check_types(config, path)
    return config


def _check_decoder(config: dict[str, Any], folder: Path) -> None:
    if config.get("num_transformer_submodules") == 2:
        raise InputError("an adapter of an encoder-decoder model is not a context", where=str(folder))
    if config.get("task_type") not in _TEXT_TASKS:
        raise InputError(
            f"an adapter for {config['task_type']} is not a context", where=str(folder), fix="CAUSAL_LM adapters are"
        )


def _check_types(config: dict[str, Any], path: Path) -> None:
    for field in _COUNTS:
        if not isinstance(config.get(field), int | None):
            raise InputError(f"is damaged: {field} is {config[field]!r}, not a number", where=str(path))
    if not isinstance(config.get("base_model_name_or_path"), str | None):
        raise InputError("is damaged: base_model_name_or_path is not a text", where=str(path))


def read_tensor(folder: Path) -> Tensor:
    """``prompt_embeddings`` of a context folder, as stored.

    ``adapter_model.safetensors`` is preferred; an ``adapter_model.bin`` is read only as far as torch can do it without
    running code from the file (``weights_only``).

    Raises:
        InputError: a missing, damaged, truncated or unsafe file, or one with other tensors.
    """
    path = folder / "adapter_model.safetensors"
    if path.is_file():
        return _read_safetensors(path)
    pickled = folder / "adapter_model.bin"
    if pickled.is_file():
        return _read_pickle(pickled)
    raise InputError("has no adapter_model.safetensors", where=str(folder))


def _read_safetensors(path: Path) -> Tensor:
    try:
        with safe_open(str(path), framework="pt") as file:
            _check_names(list(file.keys()), path)
            return file.get_tensor(TENSOR)
    except (SafetensorError, OSError) as error:
        raise InputError(f"is damaged or truncated: {error}", where=str(path), fix="restore or rebuild it") from None


def _read_pickle(path: Path) -> Tensor:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(
            "is a pickle that holds more than tensors; it is not opened, because that would run code from the file",
            where=str(path),
            fix="have its author save it as safetensors",
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"is damaged or truncated: {reason}", where=str(path), fix="restore or rebuild it") from None
    if not isinstance(tensors, dict):
        raise InputError("is not a file of named tensors", where=str(path))
    _check_names(list(tensors), path)
    if not isinstance(tensors[TENSOR], Tensor):
        raise InputError(f"{TENSOR} is not a tensor", where=str(path))
    return tensors[TENSOR].detach().contiguous()


def _check_names(names: list[Any], path: Path) -> None:
    if names != [TENSOR]:
        raise InputError(f"holds {sorted(map(str, names))} instead of one tensor {TENSOR!r}", where=str(path))


def check_finite(tensor: Tensor, folder: Path) -> None:
    """Raises InputError for a tensor that is not of floats or not finite."""
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"{TENSOR} is {tensor.dtype}, not a float tensor", where=str(folder))
    if not torch.isfinite(tensor).all():
        raise InputError(f"{TENSOR} has values that are not finite", where=str(folder), fix="rebuild it")
