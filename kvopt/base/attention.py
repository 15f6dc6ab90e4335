"""The base's own attention, watched or with gates on some keys.

Both put a function of ours in the place of the base's attention while a block runs.

Symbols: B rows, H query heads, h key/value heads, n queries, m keys, T prefix slots, d head dimension.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kvopt.base.loading import Base
from kvopt.base.own_attention import own_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OURS = "kvopt_attention"
KEPT_QUERIES = 512
"""Of more queries the gated attention weights are computed again on the way back, and not kept for every layer."""

Observe = Callable[[Any, Tensor, Tensor, Tensor, Any, "float | None"], None]
"""``observe(module, query [B, H, n, d], key [B, h, m, d], value, mask, scaling)``, queries and keys after RoPE."""


def allowed_keys(mask: Tensor) -> Tensor:
    """A mask as booleans: true where a query may look."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


@contextlib.contextmanager
def watched(base: Base, observe: Observe) -> Iterator[None]:
    """While this lasts, show ``observe`` what every layer's attention is given."""

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        observe(module, query, key, value, mask, kwargs.get("scaling"))
        return own_attention(module, query, key, value, mask, **kwargs)

    with replaced(base, attention):
        yield


@contextlib.contextmanager
def gated(base: Base, gates: Tensor) -> Iterator[None]:
    """While this lasts, the weight exp(logit) of each of the first T keys is multiplied by its gate: 1 leaves a key as
    it is, and near 0 nothing attends to it. Differentiable in the gates.

    A token's look at itself is never gated, so that its own states are what they would be if it were there.

    Args:
        gates: [T] in (0, 1].
    """
    bias = gates.log()

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        queries, keys = query.shape[-2], key.shape[-2]
        if mask is None:
            places = torch.arange(keys, device=query.device)
            mask = (places[None] <= places[keys - queries :, None])[None, None]

        def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Any:
            added = nn.functional.pad(bias, (0, keys - len(bias))).expand(queries, keys)
            if queries == keys:
                added = added * (1 - torch.eye(keys, device=added.device))
            low = torch.finfo(query.dtype).min
            whole = added.masked_fill(~allowed_keys(mask), low).to(query.dtype)
            return own_attention(module, query, key, value, whole, **kwargs)

        if queries > KEPT_QUERIES and torch.is_grad_enabled():  # its weights, [queries, keys], would be kept
            return checkpoint(attend, query, key, value, bias, use_reentrant=False)
        return attend(query, key, value, bias)

    with replaced(base, attention):
        yield


@contextlib.contextmanager
def replaced(base: Base, attention: Callable[..., Any]) -> Iterator[None]:
    """The base with this attention."""
    with computed_by(base.model, attention):
        yield


@contextlib.contextmanager
def computed_by(model: PreTrainedModel, attention: Callable[..., Any]) -> Iterator[None]:
    """The model with this attention; the two registrations that transformers asks for are taken back at the end."""
    AttentionInterface.register(_OURS, attention)
    AttentionMaskInterface.register(_OURS, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(_OURS)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(_OURS, None)
