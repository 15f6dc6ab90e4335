"""Head products with the precision that the divergence needs, on any device, without a full-size copy of the head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

VOCABULARY_BLOCK = 8192
"""Rows of the head that are converted to float32 at a time where a product in float32 meets a 16-bit head."""


def has_float32_output(device: torch.device) -> bool:
    """Whether 16-bit matrix products can return their float32 sums (``mm(..., out_dtype=float32)``): CUDA only."""
    return device.type == "cuda"


def logits_product(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """out[R, V] = hidden[R, D] @ weight[V, D]ᵀ with the sums kept in ``out``'s dtype (float32, or hidden's own dtype).

    16-bit hidden with a 16-bit ``out`` rounds the sums; with a float32 ``out`` nothing is rounded: on CUDA by the
    product itself, elsewhere by a float32 product over blocks of the head.
    """
    if hidden.dtype == weight.dtype == out.dtype:
        return torch.mm(hidden, weight.T, out=out)
    if hidden.dtype == weight.dtype and out.dtype == torch.float32 and has_float32_output(hidden.device):
        return torch.mm(hidden, weight.T, out_dtype=torch.float32, out=out)
    hidden = hidden.to(out.dtype)
    if weight.dtype == out.dtype:
        return torch.mm(hidden, weight.T, out=out)
    for start in range(0, weight.shape[0], VOCABULARY_BLOCK):
        block = weight[start : start + VOCABULARY_BLOCK].to(out.dtype)
        torch.mm(hidden, block.T, out=out[:, start : start + VOCABULARY_BLOCK])
    return out


def gradient_product(gradient: Tensor, weight: Tensor) -> Tensor:
    """[R, D] = gradient[R, V] @ weight[V, D], float32 (float64 for a float64 gradient).

    A 16-bit gradient needs a 16-bit weight; a float32 gradient multiplies a 16-bit weight block by block.
    """
    if gradient.dtype == weight.dtype:
        if gradient.dtype in (torch.bfloat16, torch.float16) and has_float32_output(gradient.device):
            return torch.mm(gradient, weight, out_dtype=torch.float32)
        product = torch.mm(gradient, weight)
        return product if product.dtype == torch.float64 else product.float()
    total = gradient.new_zeros(gradient.shape[0], weight.shape[1])
    for start in range(0, weight.shape[0], VOCABULARY_BLOCK):
        stop = start + VOCABULARY_BLOCK
        total.addmm_(gradient[:, start:stop], weight[start:stop].to(gradient.dtype))
    return total


class Product(torch.autograd.Function):
    """hidden [R, D] · weightᵀ [D, V] by :func:`logits_product`, sums float32 (float64 for float64), with gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        with torch.autocast(hidden.device.type, enabled=False):
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
            out = torch.empty(len(hidden), len(weight), dtype=dtype, device=hidden.device)
            return logits_product(hidden, weight, out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        by_hidden = by_weight = None
        if ctx.needs_input_grad[0]:
            fast = has_float32_output(weight.device) and weight.dtype != torch.float64
            by_hidden = gradient_product(upstream.to(weight.dtype) if fast else upstream, weight).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            by_weight = (upstream.T @ hidden.to(upstream.dtype)).to(weight.dtype)
        return by_hidden, by_weight
