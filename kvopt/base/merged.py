"""Attention of rows in one line on a CPU: to the prefix, which all of them see whole, and to themselves, computed apart
and merged by their log-sum-exps.

There is one copy of the prefix, no mask and no padding; query heads that share keys and values read them in place. With
outputs o₁, o₂ and log-sum-exps l₁, l₂ of the two parts, the attention to both is

    o = (exp(l₁) o₁ + exp(l₂) o₂) / exp(l),    l = log(exp(l₁) + exp(l₂)),

as in Dao et al. 2022 (FlashAttention) and Juravsky et al. 2024 (Hydragen). The backward pass of each part is the
kernel's own, given o and l of the whole: the weights that it computes again are then those of the whole softmax.

Symbols: H query heads, h key/value heads, g = H / h, N tokens of all rows, T prefix slots, d head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kvopt.base.own_attention import own_attention
from kvopt.base.packing import end_to_end
from kvopt.base.probe import COARSE, TOLERANCE, Capability, text_config
from kvopt.config.model import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "kvopt_merged"
"""What the attention of a model is called that can take rows and prefix apart."""
CHECKED_PREFIX, CHECKED_ROWS = 3, [2, 1]
"""Of the check: prefix slots, and the lengths of rows that begin with the same token."""


@dataclass(frozen=True)
class Apart:
    """What stands beside the keys and values of a line: those of the prefix, [h, T, d] for each layer, and the lengths
    of the rows in the line.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    lengths: list[int]

    @property
    def arguments(self) -> dict[str, Any]:
        """Of the call of a model whose attention is NAME. The mask only keeps transformers from making one."""
        return {"kvopt_apart": self, "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool)}


def use_merged(model: PreTrainedModel) -> None:
    """Let the model's attention take rows and prefix apart; else it computes what it computed before."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, kvopt_apart: Apart | None = None, **kwargs: Any
) -> tuple[Tensor, Any]:
    """The attention of a model that :func:`use_merged` was called for, as transformers calls it: query [1, H, N, d],
    key and value [1, h, N, d] after RoPE, of the line alone; the output is [1, N, H, d].
    """
    if kvopt_apart is None:
        return own_attention(module, query, key, value, mask, **kwargs)
    keys, values = kvopt_apart.keys[module.layer_idx], kvopt_apart.values[module.layer_idx]
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    output = merged_attention(query[0], key[0], value[0], keys, values, kvopt_apart.lengths, scale)
    return output.transpose(0, 1)[None].contiguous(), None


def merged_attention(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, lengths: list[int], scale: float
) -> Tensor:
    """Attention [H, N, d] of rows of these lengths to a prefix of at least one slot and, causally, each to itself.

    Differentiable once in all tensors.

    Args:
        query: [H, N, d].
        key, value: of the rows, [h, N, d].
        keys, values: of the prefix, [h, T, d].
        scale: factor on the logits.
    """
    dtype = query.dtype  # under autocast, rotated queries, values and the prefix can have three
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    query, key, value, keys, values = (t.to(dtype) for t in (query, key, value, keys, values))
    output: Tensor = _Merged.apply(query, key, value, keys, values, lengths, scale)
    return output


class _Merged(torch.autograd.Function):
    """A group of query heads is the kernel's heads, and the h groups are its batch: [h, g, N, d]."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        keys: Tensor,
        values: Tensor,
        lengths: list[int],
        scale: float,
    ) -> Tensor:
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        groups = len(query) // len(key)
        grouped, key_heads, value_heads = query.unflatten(0, (-1, groups)), _shared(key, groups), _shared(value, groups)
        out, lse = attention(grouped, _shared(keys, groups), _shared(values, groups), 0.0, False, scale=scale)
        rows = zip(*(t.split(lengths, -2) for t in (grouped, key_heads, value_heads)), strict=True)
        parts = [attention(*row, 0.0, True, scale=scale) for row in rows]
        own, own_lse = torch.cat([part[0] for part in parts], -2), torch.cat([part[1] for part in parts], -1)
        whole = torch.logaddexp(lse, own_lse)
        share = (lse - whole).exp()[..., None]
        merged = own.to(share.dtype).lerp(out.to(share.dtype), share).to(query.dtype)
        ctx.save_for_backward(query, key, value, keys, values, merged, whole)
        ctx.lengths, ctx.scale = lengths, scale
        return merged.flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dtype, lengths, scale = gradient.dtype, ctx.lengths, ctx.scale
        *saved, merged, whole = ctx.saved_tensors
        # in 16 bit the kernel's backward pass takes up to three times as long as in float32
        query, key, value, keys, values, merged, gradient = (t.to(whole.dtype) for t in (*saved, merged, gradient))
        groups = len(query) // len(key)
        query, gradient = (t.unflatten(0, (-1, groups)) for t in (query, gradient))
        by_query, by_keys, by_values = attention(
            gradient, query, _shared(keys, groups), _shared(values, groups), merged, whole, 0.0, False, scale=scale
        )
        heads = gradient, query, _shared(key, groups), _shared(value, groups), merged
        rows = zip(*(t.split(lengths, -2) for t in heads), whole.split(lengths, -1), strict=True)
        parts = [attention(*row, 0.0, True, scale=scale) for row in rows]
        by_query = (by_query + torch.cat([part[0] for part in parts], -2)).flatten(0, 1)
        by_key, by_value = (torch.cat([part[i].sum(1) for part in parts], -2) for i in (1, 2))
        results = by_query, by_key, by_value, by_keys.sum(1), by_values.sum(1)
        return *(t.to(dtype) for t in results), None, None


def _shared(states: Tensor, groups: int) -> Tensor:
    """Keys or values [h, m, d] as each query head sees them, [h, g, m, d], not copied."""
    return states[:, None].expand(-1, groups, -1, -1)


def merged_fault(model: PreTrainedModel, ids: Sequence[int], tolerance: float) -> str | None:
    """Why rows and prefix cannot be apart for this model, None when they can.

    A prefix and two rows that go on from it are run apart: outputs must agree with a plain pass to a relative
    ``tolerance``. The model's attention must be NAME (:func:`use_merged`).
    """
    tokens, start = torch.tensor([list(ids[: CHECKED_PREFIX + max(CHECKED_ROWS)])]), CHECKED_PREFIX
    backbone: Any = model.get_decoder()
    packing = end_to_end(CHECKED_ROWS)
    try:
        with torch.no_grad():
            seen = DynamicCache()
            plain = backbone(input_ids=tokens, past_key_values=seen, use_cache=True).last_hidden_state[0, start:]
            layers: Any = seen.layers
            keys = [layer.keys[0, :, :start] for layer in layers]
            values = [layer.values[0, :, :start] for layer in layers]
            hidden = backbone(
                input_ids=packing.packed(tokens[:, start:].expand(len(CHECKED_ROWS), -1)),
                position_ids=packing.positions(start),
                use_cache=False,
                **Apart(keys, values, CHECKED_ROWS).arguments,
            ).last_hidden_state[0]
    except Exception as error:  # foreign architectures, and other versions of torch, fail in their own ways
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    expected = torch.cat([plain[:length] for length in CHECKED_ROWS]).float()
    apart = float((hidden.float() - expected).norm() / expected.norm().clamp_min(1e-12))
    return None if apart <= tolerance else f"rows apart from their prefix differ by {apart:.2g}"


def with_merged(model: PreTrainedModel, ids: Sequence[int], found: Capability, config: ModelConfig) -> bool:
    """On a CPU, let the model's attention take rows and prefix apart if it is PyTorch's over all positions, unless the
    config names an attention or wants rows padded. Where the check fails, nothing changes: rows are packed with masks.
    """
    text, before = text_config(model.config), model.config._attn_implementation
    chosen = config.attention == "padded" or config.attn_implementation != "auto"
    if model.device.type != "cpu" or before != "sdpa" or chosen or not found.packs:
        return False
    if found.geometry.sliding_window is not None or getattr(text, "attention_dropout", None):
        return False
    use_merged(model)
    if merged_fault(model, ids, TOLERANCE.get(model.dtype, COARSE)) is None:
        return True
    model.set_attn_implementation(before)
    return False
