"""A learned context on disk: a folder that PEFT loads as an adapter, with ``kvopt.json`` for what PEFT has no field
for and does not check.

kv is a ``CARTRIDGE`` (one tensor ``prompt_embeddings`` [T, L·2·H·d], order k0, v0, k1, v1, …), soft a
``PROMPT_TUNING`` adapter (``prompt_embeddings`` [T, D]). Both are stored in fp32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from peft import CartridgeConfig, PromptTuningConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import kvopt
from kvopt.contexts.context import KVContext, SoftContext
from kvopt.errors import InputError
from kvopt.files import replacing_directory, write_json
from kvopt.model import Base

FORMAT_VERSION = 1
TENSOR = "prompt_embeddings"
Learned = KVContext | SoftContext

_KV_TYPES = ("CARTRIDGE", "PREFIX_TUNING")


def save_context(
    context: Learned, folder: Path, base: Base, *, frozen: int = 0, record: dict[str, Any] | None = None
) -> None:
    """Write a learned context atomically.

    Args:
        context: what to write; every value must be finite.
        folder: replaced if it is there.
        base: the model that it was learned for; its identity is stored.
        frozen: leading slots that training leaves as they are.
        record: further entries of ``kvopt.json`` (template and data hashes, objective, scores, …).
    """
    g = base.geometry
    shared: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": base.name,
        "num_virtual_tokens": context.tokens,
        "num_layers": g.layers,
        "num_attention_heads": g.kv_heads,
        "num_transformer_submodules": 1,
    }
    if isinstance(context, KVContext):
        tensor = rearrange(context.states, "t l two h d -> t (l two h d)")
        config: Any = CartridgeConfig(token_dim=g.kv_heads * g.head_dim, num_frozen_tokens=frozen, **shared)
    else:
        tensor = context.embeddings
        config = PromptTuningConfig(token_dim=g.hidden_size, **shared)
    if not torch.isfinite(tensor).all():
        raise ValueError(f"context {context.name} has values that are not finite; refusing to write {folder}")
    with replacing_directory(folder) as place:
        config.save_pretrained(str(place))
        data = save({TENSOR: tensor.detach().to("cpu", torch.float32).contiguous()}, metadata={"format": "pt"})
        (place / "adapter_model.safetensors").write_bytes(data)
        write_json(
            place / "kvopt.json",
            {
                "format_version": FORMAT_VERSION,
                "kvopt_version": kvopt.__version__,
                "name": context.name,
                "kind": context.kind,
                "tokens": context.tokens,
                "positions": {"first": 0, "body": context.tokens},
                "content_sha256": context.sha256(),
                "base": {"name": base.name, **base.identity},
                **(record or {}),
            },
        )


def load_context(folder: Path, base: Base, *, name: str | None = None) -> Learned:
    """Read and check a context folder.

    A PEFT adapter that kvopt did not write is accepted when its type and shape fit; its base cannot be checked then.

    Raises:
        InputError: not a context, another base, a wrong shape or dtype, a value that is not finite, or a damaged file.
    """
    config = adapter_config(folder)
    record = read_record(folder)
    if record is not None:
        _check_base(record, base, folder)
    tensor = read_tensor(folder)
    kind = "kv" if config["peft_type"] in _KV_TYPES else "soft"
    g = base.geometry
    width = g.layers * 2 * g.kv_heads * g.head_dim if kind == "kv" else g.hidden_size
    _check_tensor(tensor, width, config, folder)
    if record is not None and record.get("kind") != kind:
        raise InputError(f"kvopt.json says {record.get('kind')!r}, the adapter is {kind!r}", where=str(folder))
    name = name or (record or {}).get("name") or folder.name
    if record is not None and tensor.dtype != torch.float32:
        raise InputError(
            f"{TENSOR} is {tensor.dtype}, kvopt writes float32", where=str(folder), mend="restore or rebuild it"
        )
    tensor = tensor.float()
    context: Learned
    if kind == "kv":
        states = rearrange(tensor, "t (l two h d) -> t l two h d", l=g.layers, two=2, h=g.kv_heads, d=g.head_dim)
        context = KVContext(name, states.contiguous())
    else:
        context = SoftContext(name, tensor)
    if record is not None and record.get("content_sha256") != context.sha256():
        raise InputError(
            "the tensor is not the one that kvopt.json describes", where=str(folder), mend="restore or rebuild it"
        )
    return context


def read_record(folder: Path) -> dict[str, Any] | None:
    """``kvopt.json`` of a context folder, None where there is none. Raises InputError for a damaged or newer one."""
    path = folder / "kvopt.json"
    if not path.is_file():
        return None
    record = _json(path)
    if record.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"format version {record.get('format_version')!r}, this kvopt reads {FORMAT_VERSION}",
            where=str(path),
            mend="update kvopt",
        )
    return record


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read as JSON: {error}", where=str(path)) from None
    if not isinstance(value, dict):
        raise InputError("is not a JSON object", where=str(path))
    return value


def adapter_config(folder: Path) -> dict[str, Any]:
    """The PEFT config of a context folder. Raises InputError for a folder that is no context."""
    path = folder / "adapter_config.json"
    if not folder.is_dir() or not path.is_file():
        raise InputError(
            "is not a context folder",
            where=str(folder),
            mend="it has no adapter_config.json; give a folder from contexts/",
        )
    config = _json(path)
    peft_type = config.get("peft_type")
    if peft_type not in (*_KV_TYPES, "PROMPT_TUNING"):
        raise InputError(
            f"a PEFT adapter of type {peft_type} is not a context",
            where=str(folder),
            mend="CARTRIDGE, PREFIX_TUNING or PROMPT_TUNING is",
        )
    if config.get("prefix_projection"):
        raise InputError("PREFIX_TUNING with a projection is not a KV cache", where=str(folder))
    return config


def _check_base(record: dict[str, Any], base: Base, folder: Path) -> None:
    stored = record.get("base", {})
    for what, digest in base.identity.items():
        if what in stored and stored[what] != digest:
            raise InputError(
                f"made for base {stored.get('name')!r}, whose {what} differs from {base.name!r}",
                where=str(folder),
                mend="use the base that it was made for",
            )


def read_tensor(folder: Path) -> Tensor:
    """``prompt_embeddings`` of a context folder. Raises InputError for a missing, damaged or truncated file."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise InputError("has no adapter_model.safetensors", where=str(folder))
    try:
        with safe_open(str(path), framework="pt") as file:
            if list(file.keys()) != [TENSOR]:
                raise InputError(f"holds {sorted(file.keys())} instead of one tensor {TENSOR!r}", where=str(path))
            return file.get_tensor(TENSOR)
    except (SafetensorError, OSError) as error:
        raise InputError(f"is damaged or truncated: {error}", where=str(path), mend="restore or rebuild it") from None


def _check_tensor(tensor: Tensor, width: int, config: dict[str, Any], folder: Path) -> None:
    where = str(folder / "adapter_model.safetensors")
    slots = config.get("num_virtual_tokens")
    if tensor.ndim != 2 or tensor.shape[0] == 0 or tensor.shape[1] != width or tensor.shape[0] != slots:
        raise InputError(
            f"{TENSOR} has shape {list(tensor.shape)}, this base and adapter_config.json need [{slots}, {width}]",
            where=where,
            mend="use the base that it was made for",
        )
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"{TENSOR} is {tensor.dtype}, not a float tensor", where=where)
    if not torch.isfinite(tensor).all():
        raise InputError(f"{TENSOR} has values that are not finite", where=where, mend="rebuild it")
