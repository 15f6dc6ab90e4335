"""The attention that a model itself computes, for a function of ours that stands in its place: PyTorch's
scaled-dot-product attention, or the model's own eager attention where that does more (a softcap, sinks).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def own_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    """The attention that the base itself computes. PyTorch's knows no softcap and no sinks.

    Args:
        module: the layer's attention.
        query, key, value: after RoPE, [B, H, n, d] and [B, h, m, d].
        mask: [B, 1, n, m], booleans or numbers to be added; None is causal.
        kwargs: what transformers hands over beside them, scaling, softcap and sinks (s_aux) among it.

    Returns:
        The output [B, n, H, d], and weights or None.
    """
    if kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    eager = sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
    if mask is None:
        queries, keys = query.shape[-2], key.shape[-2]
        places = torch.arange(keys, device=query.device)
        mask = (places[None] <= places[keys - queries :, None])[None, None]
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
    return eager(module, query, key, value, mask, **kwargs)
