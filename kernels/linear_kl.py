"""The front door: per-token divergence of two hidden states under a head, with gradients, without an N x V tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvopt.kernels import torch_backend
from kvopt.kernels.float64 import linear_kl64
from kvopt.kernels.options import Head, KernelInputError, KLOptions
from kvopt.kernels.plan import Plan, make_plan
from kvopt.kernels.stored import Moments, StoredReference, TopK, check_stored, stored_value_and_gradient
from kvopt.kernels.trust import trusted

BACKWARD_ROWS = 4096


@dataclass(frozen=True)
class LinearKL:
    """What ``linear_kl`` returns.

    kl: [N] float32 (float64 for float64 inputs), the divergence of each token in nats, 0 where masked. Never clamped.
    loss: scalar, Σ w·kl / Σ w over unmasked tokens (reduction "mean"; 0 where Σ w = 0) or Σ w·kl ("sum").
    form, backend: what was used.
    """

    kl: Tensor
    loss: Tensor
    form: str
    backend: str


@torch.compiler.disable
def linear_kl(
    candidate_hidden: Tensor,
    reference_hidden: Tensor | StoredReference,
    head: Head,
    reference_head: Head | None = None,
    options: KLOptions | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
) -> LinearKL:
    """Divergence between reference p and candidate q at every token (see KLOptions for which, and how).

    Args:
        candidate_hidden: [N, D], any strides; the gradient flows here.
        reference_hidden: [N, D_t], or a stored reference (Moments, TopK); a constant, no gradient flows here.
        head: the candidate's head; its gradient is computed only if its weight or bias requires one.
        reference_head: the reference's head where it differs; a constant.
        options: default ``KLOptions()``.
        mask: [N] bool; False tokens are dropped before any product.
        weights: [N] weights w of ``loss``; ``kl`` itself is unweighted.

    Raises:
        KernelInputError: shapes, dtypes or values do not fit. UnsupportedError: no such combination; names another.
    """
    options = options or KLOptions()
    plan: Plan | None = None
    if isinstance(reference_hidden, (Moments, TopK)):
        form = check_stored(reference_hidden, candidate_hidden, head, options)
    else:
        plan = make_plan(candidate_hidden, reference_hidden, head, reference_head or head, options)
        plan = trusted(plan, candidate_hidden.dtype)
        form = plan.form
    count = len(candidate_hidden)
    _check_vector(mask, count, "mask", torch.bool)
    _check_vector(weights, count, "weights", None)
    kept = None if mask is None else mask.nonzero()[:, 0]
    with torch.autocast(candidate_hidden.device.type, enabled=False):
        candidate, reference = candidate_hidden, reference_hidden
        if kept is not None:
            candidate, reference = candidate[kept], reference[kept]
        kl = _divergence(plan, candidate, reference, head, options)
        if kept is not None:
            kl = kl.new_zeros(count).index_put((kept,), kl)
        loss = _reduce(kl, mask, weights, options.reduction)
        return LinearKL(kl, loss, form, "torch" if plan is None else plan.backend)


def _check_vector(vector: Tensor | None, count: int, name: str, dtype: torch.dtype | None) -> None:
    if vector is None:
        return
    if vector.shape != (count,):
        raise KernelInputError(f"{name} has shape {tuple(vector.shape)}; it must be [{count}], one entry per token")
    if dtype is not None and vector.dtype != dtype:
        raise KernelInputError(f"{name} is {vector.dtype}; it must be {dtype}")


def _reduce(kl: Tensor, mask: Tensor | None, weights: Tensor | None, reduction: str) -> Tensor:
    w = torch.ones_like(kl) if weights is None else weights.detach().to(kl.dtype)
    if mask is not None:
        w = w * mask
    total = (kl * w).sum()
    if reduction == "sum":
        return total
    mass = w.sum()
    return total / torch.where(mass == 0, torch.ones_like(mass), mass)


def _divergence(
    plan: Plan | None, candidate: Tensor, reference: Tensor | StoredReference, head: Head, options: KLOptions
) -> Tensor:
    if plan is None:
        return _StoredDivergence.apply(candidate, reference, head, options)
    assert isinstance(reference, Tensor)
    reference = reference.detach()
    if plan.backend == "reference":
        kl = linear_kl64(candidate, reference, plan.head, plan.reference_head, plan.options)
        return kl.to(plan.accumulate)
    return _Divergence.apply(candidate, plan.head.weight, plan.head.bias, reference, plan)


def _backend(plan: Plan) -> Any:
    """The module that computes the plan; Triton is imported only where it is used."""
    if plan.backend == "triton":
        from kvopt.kernels import triton_backend

        return triton_backend
    return torch_backend


def _scaled(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of gradient [N, D] times upstream [N], in ``dtype``, without a float32 copy of all of it."""
    out = torch.empty_like(gradient, dtype=dtype)
    for part in range(0, len(gradient), BACKWARD_ROWS):
        rows = slice(part, part + BACKWARD_ROWS)
        out[rows] = gradient[rows] * upstream[rows, None]
    return out


class _StoredDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, candidate: Tensor, stored: StoredReference, head: Head, options: KLOptions) -> Tensor:
        value, gradient = stored_value_and_gradient(stored, candidate, head, options, candidate.requires_grad)
        ctx.dtype = candidate.dtype
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return _scaled(gradient, upstream, ctx.dtype), None, None, None


class _Divergence(torch.autograd.Function):
    """Gradient by the hidden states is computed with the value; with a trained head, all gradients in the backward."""

    @staticmethod
    def forward(
        ctx: Any, candidate: Tensor, weight: Tensor, bias: Tensor | None, reference: Tensor, plan: Plan
    ) -> Tensor:
        ctx.plan, ctx.trained = plan, plan.head.trained
        want = candidate.requires_grad and not ctx.trained
        value, gradient = _backend(plan).value_and_hidden_gradient(plan, candidate.detach(), reference, want)
        ctx.dtype = candidate.dtype
        if ctx.trained:
            ctx.save_for_backward(candidate, reference)
        else:
            ctx.save_for_backward(gradient)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.trained:
            (gradient,) = ctx.saved_tensors
            return _scaled(gradient, upstream, ctx.dtype), None, None, None, None
        candidate, reference = ctx.saved_tensors
        head = ctx.plan.head
        by_hidden, by_weight, by_bias = _backend(ctx.plan).all_gradients(ctx.plan, candidate, reference, upstream)
        return (
            by_hidden.to(ctx.dtype) if ctx.needs_input_grad[0] else None,
            by_weight.to(head.weight.dtype) if ctx.needs_input_grad[1] else None,
            by_bias.to(head.bias.dtype) if by_bias is not None and ctx.needs_input_grad[2] else None,
            None,
            None,
        )
