"""FlexAttention for rows that stand in one line after a shared prefix: the prefix is there once, no padding is computed
and query heads that share keys and values read them in place.

A block mask says who sees what, so blocks of queries and keys that do not meet are never computed (He et al. 2024,
FlexAttention). Softcaps are a change of the logits, attention sinks a factor on what comes out, sliding windows another
block mask.

Symbols: H query heads, n positions of the line, T prefix slots, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kvopt.base.own_attention import own_attention
from kvopt.base.packing import Packing, by_layer, one_line
from kvopt.base.probe import COARSE, TOLERANCE, Capability, text_config
from kvopt.config.model import ModelConfig
from kvopt.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "kvopt_flex"
"""What the attention of a model is called that can take block masks."""
PADDING = -1
PREFIX = -2
UNBOUNDED = 2**30
"""A window that no row reaches the end of."""
KERNEL_VARIANTS = 64
"""Of one compiled function, at most: by dtype, grouping, what needs a gradient, and softcap."""
CHECKED_ROWS, CHECKED_PREFIX = 80, 3
"""Of the check: rows of the other tokens, enough for more than one block; prefix slots."""


def use_flex(model: PreTrainedModel) -> None:
    """Let the model's attention take block masks; with any other mask it computes what it computed before."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def block_mask(packing: Packing, prefix: int, window: int | None, device: torch.device) -> BlockMask:
    """What each token of the line sees of prefix and line, [1, 1, n, T + n]: see :meth:`Packing.mask`."""
    line_owner, line_position = packing.owners()[0], packing.positions(prefix)[0]
    owner, position = line_owner.to(device), line_position.to(device)
    key_owner = torch.cat([torch.full((prefix,), PREFIX), line_owner]).to(device)
    key_position = torch.cat([torch.arange(prefix), line_position]).to(device)
    key_place = torch.arange(-prefix, packing.width, device=device)  # in the line; the prefix's are below 0
    span = torch.tensor(UNBOUNDED if window is None else window, device=device)  # a tensor: one kernel for all

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (key_owner[key] == PREFIX) | (key_owner[key] == owner[query])
        return own & (key_place[key] <= query) & (position[query] - key_position[key] < span)

    make = _compiled(create_block_mask) if device.type == "cuda" else create_block_mask
    return make(sees, 1, None, packing.width, prefix + packing.width, device=device)


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    """The attention of a model that :func:`use_flex` was called for, as transformers calls it: query [1, H, n, d], key
    and value [1, h, T + n, d] after RoPE; the output is [1, n, H, d].
    """
    if not isinstance(mask, BlockMask):
        return own_attention(module, query, key, value, mask, **kwargs)
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    run = _compiled(flex_attention) if query.is_cuda else flex_attention
    result: Any = run(
        query,
        key,
        value,
        score_mod=None if softcap is None else _capped(softcap),
        block_mask=mask,
        scale=kwargs.get("scaling"),
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=None if sinks is None else AuxRequest(lse=True),
    )
    output = result if sinks is None else _with_sinks(result[0], result[1].lse, sinks)
    return output.transpose(1, 2).contiguous(), None


def _capped(softcap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


def _with_sinks(output: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """A sink s takes the share exp(s) / (exp(lse) + exp(s)) of each head's weights, and gives nothing."""
    share = torch.sigmoid(lse - sinks.float()[None, :, None])
    return output * share[..., None].to(output.dtype)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(function, dynamic=True)

    def run(*args: Any, **kwargs: Any) -> Any:
        import torch._dynamo.config as settings

        # beyond the limit torch would compute and keep all logits, and not say so
        with settings.patch(recompile_limit=KERNEL_VARIANTS, fail_on_recompile_limit_hit=True):
            return compiled(*args, **kwargs)

    return run


def flex_fault(
    model: PreTrainedModel, ids: Sequence[int], layer_types: Sequence[str], window: int | None, tolerance: float
) -> str | None:
    """Why rows cannot be packed for this model on its device, None when they can.

    A prefix and many short rows are run packed and padded: outputs and the gradients by the prefix must agree to a
    relative ``tolerance``. The model's attention must be able to take block masks (:func:`use_flex`).
    """
    device = model.get_input_embeddings().weight.device
    tokens = torch.tensor([list(ids)], device=device)
    head, tail = tokens[:, :CHECKED_PREFIX], tokens[:, CHECKED_PREFIX:]
    length, width = head.shape[1], tail.shape[1]
    packing = one_line([width] * CHECKED_ROWS)
    backbone: Any = model.get_decoder()
    try:
        with torch.no_grad():
            seen = DynamicCache()
            backbone(input_ids=head, past_key_values=seen, use_cache=True)
        results = []
        for packed in (True, False):
            states = [(layer.keys.clone().requires_grad_(), layer.values) for layer in seen.layers]
            lines = 1 if packed else CHECKED_ROWS
            cache = DynamicCache([(k.expand(lines, -1, -1, -1), v.expand(lines, -1, -1, -1)) for k, v in states])
            rows = tail.expand(CHECKED_ROWS, -1)
            positions = torch.arange(length, length + width, device=device).expand(CHECKED_ROWS, -1)
            mask: Any = None
            if packed:
                mask = by_layer(layer_types, window, lambda span: block_mask(packing, length, span, device))
                rows, positions = packing.packed(rows), packing.positions(length).to(device)
            with torch.enable_grad():
                hidden = backbone(
                    input_ids=rows,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state
                hidden = hidden[0, : CHECKED_ROWS * width] if packed else hidden.flatten(0, 1)
                weights = torch.linspace(-1, 1, hidden.numel(), device=device).view_as(hidden)
                gradients = torch.autograd.grad((hidden.float() * weights).sum(), [keys for keys, _ in states])
            results.append([hidden.detach(), *gradients])
    except Exception as error:  # compilers fail in their own ways; the reason is kept
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    for ours, theirs in zip(*results, strict=True):
        apart = float((ours.float() - theirs.float()).norm() / theirs.float().norm().clamp_min(1e-12))
        if not apart <= tolerance:
            return f"packed and padded rows differ by {apart:.2g}"
    return None


def with_flex(
    model: PreTrainedModel, ids: Sequence[int], found: Capability, config: ModelConfig, say: Callable[[str], None]
) -> Capability:
    """What was found, with FlexAttention on a CUDA GPU where its check passes; the model's attention then takes block
    masks. Raises InputError where ``attention: packed`` is asked for and nothing packs.
    """
    fault = None
    text = text_config(model.config)
    chosen = config.attention == "padded" or config.attn_implementation != "auto"
    if model.device.type == "cuda" and not chosen and not getattr(text, "attention_dropout", 0):
        before = model.config._attn_implementation
        use_flex(model)
        geometry = found.geometry
        tolerance = TOLERANCE.get(model.dtype, COARSE)
        fault = flex_fault(model, ids, geometry.layer_types, geometry.sliding_window, tolerance)
        if fault is None:
            return replace(found, flex=True, added=False)
        model.set_attn_implementation(before)
    if config.attention == "packed" and not found.packs:
        why = fault or f"it does not follow a mask of any form ({model.config._attn_implementation})"
        raise InputError(
            f"rows of this base cannot be packed: {why}",
            where="model.attention packed",
            fix="set model.attention: auto",
        )
    if fault is not None:
        say(
            f"warning: rows are {'packed without it' if config.attention == 'packed' else 'padded'}: FlexAttention"
            f" cannot be used here: {fault}"
        )
    return found
