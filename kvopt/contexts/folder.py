"""A learned context on disk: a folder that PEFT loads as an adapter, with ``kvopt.json`` for what PEFT has no field
for and does not check.

kv is a ``CARTRIDGE`` or ``PREFIX_TUNING`` adapter (one tensor ``prompt_embeddings`` [T, L·2·H·d], order k0, v0, k1,
v1, …), soft a ``PROMPT_TUNING`` adapter (``prompt_embeddings`` [T, D]). kvopt writes fp32 and reads what any PEFT
wrote; adapters of others carry no identity of their base, so only their shapes can be checked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from peft import CartridgeConfig, PrefixTuningConfig, PromptTuningConfig
from safetensors.torch import save
from torch import Tensor

from kvopt.base.identity import check_base
from kvopt.base.loading import Base
from kvopt.base.rope import Rope
from kvopt.contexts.adapter import (
    FORMAT_VERSION,
    KV_TYPES,
    RECORD,
    TENSOR,
    adapter_config,
    check_finite,
    kind_of,
    read_record,
    read_tensor,
)
from kvopt.contexts.context import KVContext, SoftContext
from kvopt.documents.context_record import ContextFacts, ContextRecord, SlotPositions
from kvopt.documents.validated import write_document
from kvopt.errors import InputError
from kvopt.storage.files import replacing_directory
from kvopt.version import VERSION

__all__ = [
    "TensorContext",
    "adapter_config",
    "load_context",
    "read_record",
    "read_tensor",
    "save_context",
    "write_adapter",
]

TensorContext = KVContext | SoftContext


def save_context(
    context: TensorContext,
    folder: Path,
    base: Base,
    *,
    frozen: int = 0,
    first: int = 0,
    record: ContextFacts | None = None,
) -> None:
    """Write a learned context atomically.

    Args:
        context: what to write; every value must be finite.
        folder: replaced if it is there.
        base: the model that it was learned for; its identity is stored.
        frozen: leading slots that training leaves as they are.
        first: the position that its first slot stands at (keys are stored as the context has them).
        record: further entries of ``kvopt.json`` (template and data hashes, objective, scores, …).
    """
    g = base.geometry
    shared: dict[str, Any] = {
        "base_model_name_or_path": base.name,
        "num_virtual_tokens": context.tokens,
        "num_layers": g.layers,
        "num_attention_heads": g.kv_heads,
    }
    if isinstance(context, KVContext):
        tensor = rearrange(context.states, "t l two h d -> t (l two h d)")
        shared |= {"peft_type": "CARTRIDGE", "token_dim": g.kv_heads * g.head_dim, "num_frozen_tokens": frozen}
    else:
        tensor = context.embeddings
        shared |= {"peft_type": "PROMPT_TUNING", "token_dim": g.hidden_size}
    if not torch.isfinite(tensor).all():
        raise ValueError(f"context {context.name} has values that are not finite; refusing to write {folder}")
    with replacing_directory(folder) as place:
        write_adapter(place, tensor, shared)
        whole = ContextRecord(
            format_version=FORMAT_VERSION,
            kvopt_version=VERSION,
            name=context.name,
            kind="kv" if isinstance(context, KVContext) else "soft",
            tokens=context.tokens,
            positions=SlotPositions(first=first, body=first + context.tokens),
            content_sha256=context.sha256(),
            base=base.document,
            **(record.given() if record else {}),
        )
        write_document(place / RECORD, whole)


def write_adapter(place: Path, tensor: Tensor, fields: dict[str, Any]) -> None:
    """The two files of a PEFT adapter: ``fields`` of its config (``peft_type`` among them) and the tensor in fp32."""
    fields = {"task_type": "CAUSAL_LM", "inference_mode": True, "num_transformer_submodules": 1, **fields}
    peft_type = fields.pop("peft_type")
    frozen = fields.pop("num_frozen_tokens", 0)
    config: Any
    if peft_type == "CARTRIDGE":
        config = CartridgeConfig(num_frozen_tokens=frozen, **fields)
    elif peft_type == "PREFIX_TUNING":
        config = PrefixTuningConfig(**fields)
    else:
        config = PromptTuningConfig(**fields)
    config.save_pretrained(str(place))
    data = save({TENSOR: tensor.detach().to("cpu", torch.float32).contiguous()}, metadata={"format": "pt"})
    (place / "adapter_model.safetensors").write_bytes(data)


def load_context(folder: Path, base: Base, *, name: str | None = None) -> TensorContext:
    """Read and check a context folder; a KV context that was moved comes back at position 0.

    A PEFT adapter that kvopt did not write is accepted when its type and shape fit; its base cannot be checked then.

    Raises:
        InputError: not a context, another base, a wrong shape or dtype, a value that is not finite, or a damaged file.
    """
    config = adapter_config(folder)
    record = read_record(folder)
    if record is not None:
        check_base(record.base, base.name, base.identity, folder)
    tensor = read_tensor(folder)
    kind = kind_of(config)
    g = base.geometry
    width = g.layers * 2 * g.kv_heads * g.head_dim if kind == "kv" else g.hidden_size
    _check_tensor(tensor, width, config, folder)
    _check_heads(config, base, folder)
    if record is not None and record.kind != kind:
        raise InputError(f"kvopt.json says {record.kind!r}, the adapter is {kind!r}", where=str(folder))
    name = name or (record.name if record else folder.resolve().name)
    if record is not None and tensor.dtype != torch.float32:
        raise InputError(
            f"{TENSOR} is {tensor.dtype}, kvopt writes float32", where=str(folder), fix="restore or rebuild it"
        )
    tensor = tensor.float()
    context: TensorContext
    if kind == "kv":
        states = rearrange(tensor, "t (l two h d) -> t l two h d", l=g.layers, two=2, h=g.kv_heads, d=g.head_dim)
        context = KVContext(name, states.contiguous())
    else:
        context = SoftContext(name, tensor)
    if record is not None and record.content_sha256 != context.sha256():
        raise InputError(
            "the tensor is not the one that kvopt.json describes", where=str(folder), fix="restore or rebuild it"
        )
    first = record.first_position if record else 0
    if first and isinstance(context, KVContext):
        context = KVContext(name, rotated(context.states, -first, base.rope))
    return context


def rotated(states: Tensor, shift: int, rope: Rope) -> Tensor:
    """States [T, L, 2, H, d] whose keys stand ``shift`` positions further on; values stay. fp32, exact to rounding."""
    layers = [
        torch.stack(
            [rope.rotate(states[:, layer, 0].transpose(0, 1), shift, layer).transpose(0, 1), states[:, layer, 1]],
            dim=1,
        )
        for layer in range(states.shape[1])
    ]
    return torch.stack(layers, dim=1)


def _check_tensor(tensor: Tensor, width: int, config: dict[str, Any], folder: Path) -> None:
    slots = config.get("num_virtual_tokens")
    if tensor.ndim != 2 or tensor.shape[0] == 0 or tensor.shape[1] != width or tensor.shape[0] != slots:
        raise InputError(
            f"{TENSOR} has shape {list(tensor.shape)}, this base and adapter_config.json need [{slots}, {width}]",
            where=str(folder / "adapter_model.safetensors"),
            fix="use the base that it was made for",
        )
    check_finite(tensor, folder / "adapter_model.safetensors")


def _check_heads(config: dict[str, Any], base: Base, folder: Path) -> None:
    """Layers and heads that multiply to the same width are still another base's."""
    if config["peft_type"] not in KV_TYPES:
        return
    ours = {"num_layers": base.geometry.layers, "num_attention_heads": base.geometry.kv_heads}
    for field, count in ours.items():
        if config.get(field) not in (None, count):
            raise InputError(
                f"adapter_config.json says {field}: {config[field]}, {base.name!r} has {count}",
                where=str(folder),
                fix="use the base that it was made for",
            )
