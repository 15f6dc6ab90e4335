"""The divergence on any device: chunks of tokens, three head products each, row-wise work in place in between."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvopt.kernels.options import Head
from kvopt.kernels.plan import Plan
from kvopt.kernels.products import gradient_product, logits_product
from kvopt.kernels.rows import divergence_rows

BLOCK_BYTES = 4 * 2**20
"""float32 bytes of logits whose row-wise work is done at a time on a CPU: a few such blocks fit its cache."""


class LogitChunks:
    """Computes logits chunk by chunk into two buffers that are allocated once: z_t, and u = z_s − z_t."""

    def __init__(self, plan: Plan, device: torch.device, tokens: int):
        self.plan = plan
        rows, vocabulary = min(plan.rows_per_chunk, tokens), plan.head.size
        self.z_t = torch.empty(rows, vocabulary, dtype=plan.accumulate, device=device)
        self.u = torch.empty(rows, vocabulary, dtype=plan.product, device=device)
        self.block = max(1, BLOCK_BYTES // (4 * vocabulary)) if device.type == "cpu" else rows
        self.shared = plan.head.same_as(plan.reference_head)

    def fill(self, candidate: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """Raw head products of a chunk: (reference product, candidate product or its difference to the reference)."""
        z_t, u = self.z_t[: len(candidate)], self.u[: len(candidate)]
        logits_product(reference, self.plan.reference_head.rows, z_t)
        if self.plan.form == "difference":
            difference = candidate.to(self.plan.accumulate) - reference.to(self.plan.accumulate)
            logits_product(difference.to(self.plan.product), self.plan.head.rows, u)
        else:
            logits_product(candidate, self.plan.head.rows, u)
        return z_t, u

    def blocks(self, z_t: Tensor, u: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
        """Blocks of rows of a filled chunk: (rows, z_t, z_s − z_t, d(z_s)/d(raw product) or None), all final logits."""
        for start in range(0, len(z_t), self.block):
            rows = slice(start, start + self.block)
            block_u = u[rows].to(self.plan.accumulate)
            yield rows, *self._finish(z_t[rows], block_u)

    def _finish(self, x_t: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """From raw products to final logits; bias, scale, softcap and temperature are applied here, and only here."""
        plan, head, temperature = self.plan, self.plan.head, self.plan.options.temperature
        if plan.form == "difference":
            x_t = affine_(x_t, head)
            x = x.mul_(head.scale) if head.scale != 1.0 else x
            if head.softcap is None:
                if temperature == 1.0:
                    return x_t, x, None
                return x_t.div_(temperature), x.div_(temperature), None
            cap = head.softcap
            tanh_s, tanh_t = torch.tanh((x_t + x) / cap), torch.tanh(x_t / cap)
            u = torch.tanh(x / cap) * (1 - tanh_t * tanh_s)
            return tanh_t * (cap / temperature), u * (cap / temperature), 1 - tanh_s * tanh_s
        z_t, _ = final_logits(x_t, plan.reference_head, temperature)
        z_s, slope = final_logits(x, head, temperature)
        return z_t, z_s - z_t, slope


def affine_(x: Tensor, head: Head) -> Tensor:
    """scale * (x + bias), in place."""
    if head.offsets is not None:
        x.add_(head.offsets)
    return x.mul_(head.scale) if head.scale != 1.0 else x


def final_logits(x: Tensor, head: Head, temperature: float) -> tuple[Tensor, Tensor | None]:
    """Final logits of raw head products (which are overwritten), and the softcap's slope (None without softcap)."""
    x, slope = affine_(x, head), None
    if head.softcap is not None:
        x = torch.tanh(x.div_(head.softcap))
        slope = 1 - x * x
        x = x.mul_(head.softcap)
    return (x.div_(temperature) if temperature != 1.0 else x), slope


def value_and_hidden_gradient(
    plan: Plan, candidate: Tensor, reference: Tensor, want_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Per-token divergence [N] and its gradient by the candidate's hidden states [N, D] (both ``plan.accumulate``)."""
    value = torch.empty(len(candidate), dtype=plan.accumulate, device=candidate.device)
    gradient = torch.empty(candidate.shape, dtype=plan.accumulate, device=candidate.device) if want_gradient else None
    options, factor = plan.options, plan.head.scale / plan.options.temperature
    if len(candidate) == 0:
        return value, gradient
    chunks = LogitChunks(plan, candidate.device, len(candidate))
    for start in range(0, len(candidate), plan.rows_per_chunk):
        part = slice(start, start + plan.rows_per_chunk)
        z_t, u = chunks.fill(candidate[part], reference[part])
        rescale = None
        if want_gradient and plan.product == torch.float16:
            rescale = torch.empty(len(u), 1, dtype=plan.accumulate, device=u.device)
        for rows, block_z, block_u, slope in chunks.blocks(z_t, u):
            value[part][rows], block_gradient = divergence_rows(
                block_z, block_u, options.divergence, options.beta, want_gradient
            )
            if block_gradient is not None:
                _store_gradient(block_gradient, slope, u[rows], None if rescale is None else rescale[rows])
        if gradient is not None:
            product = gradient_product(u, plan.head.rows)
            gradient[part] = (product if rescale is None else product * rescale) * factor
    return value, gradient


def _store_gradient(gradient: Tensor, slope: Tensor | None, out: Tensor, rescale: Tensor | None) -> None:
    """Writes dL/d(raw product) over the logits; float16 rows are stored relative to their largest entry."""
    if slope is not None:
        gradient = gradient * slope
    if rescale is not None:
        torch.amax(gradient.abs(), -1, keepdim=True, out=rescale)
        gradient = gradient / rescale.clamp_(min=torch.finfo(torch.float32).tiny)
    out.copy_(gradient)


def all_gradients(
    plan: Plan, candidate: Tensor, reference: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of Σ upstream · divergence by hidden states [N, D], weight [V', D] and bias [V'] (padding rows 0)."""
    options, head = plan.options, plan.head
    by_hidden = torch.zeros(candidate.shape, dtype=plan.accumulate, device=candidate.device)
    by_weight = torch.zeros(head.weight.shape, dtype=plan.accumulate, device=candidate.device)
    by_bias = None if head.bias is None else torch.zeros_like(head.bias, dtype=plan.accumulate)
    if len(candidate) == 0:
        return by_hidden, by_weight, by_bias
    chunks = LogitChunks(plan, candidate.device, len(candidate))
    factor = head.scale / options.temperature
    for start in range(0, len(candidate), plan.rows_per_chunk):
        part = slice(start, start + plan.rows_per_chunk)
        z_t, u = chunks.fill(candidate[part], reference[part])
        weights = (upstream[part] * factor).to(plan.accumulate)[:, None]
        for rows, block_z, block_u, slope in chunks.blocks(z_t, u):
            _, gradient = divergence_rows(block_z, block_u, options.divergence, options.beta, True)
            assert gradient is not None
            z_t[rows] = (gradient if slope is None else gradient * slope) * weights[rows]
        by_hidden[part] = gradient_product(z_t, head.rows)
        by_weight[: head.size].addmm_(z_t.T, candidate[part].to(plan.accumulate))
        if by_bias is not None:
            by_bias[: head.size] += z_t.sum(0)
    return by_hidden, by_weight, by_bias
