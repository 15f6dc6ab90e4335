"""The divergence on any device: chunks of tokens, three head products each, row-wise work in place in between."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kvopt.kernels.options import Head
from kvopt.kernels.plan import Plan
from kvopt.kernels.products import gradient_product, logits_product
from kvopt.kernels.refine import Refined, refine_
from kvopt.kernels.rows import row_function

BLOCK_BYTES = 3 * 2**20
"""float32 bytes of logits whose row-wise work is done at a time on a CPU: a few such blocks fit its cache."""

GPU_BLOCK_ROWS = 128

ROUNDED_LIMIT = 0.25
"""Forward KL in nats beyond which 16-bit rounding of the difference logits may break the precision contract."""


class RowBlock(NamedTuple):
    """Some rows of a chunk as final logits: reference z_t, u = z_s − z_t, and d(z_s)/d(raw product) or None.

    refined: the tokens whose logits are exact, where the others were rounded to 16 bits.
    scratch: [2, R, V] of the same dtype, on a CPU: room for the row-wise work.
    """

    rows: slice
    z_t: Tensor
    u: Tensor
    slope: Tensor | None
    refined: Refined | None
    scratch: Tensor | None

    @property
    def center(self) -> Tensor | None:
        """[R, 1], the mean of u over the refined tokens by their share of p: close to Σ p u, for nothing."""
        if self.refined is None:
            return None
        tokens = self.refined.tokens
        share = torch.softmax(self.z_t.gather(1, tokens), -1)
        return (share * self.u.gather(1, tokens)).sum(-1, keepdim=True)


class LogitChunks:
    """Computes logits chunk by chunk into buffers that are allocated once: z_t, u = z_s − z_t, and dL/dz_s."""

    def __init__(self, plan: Plan, device: torch.device, tokens: int):
        self.plan = plan
        rows, vocabulary = min(plan.rows_per_chunk, tokens), plan.head.size
        self.z_t = torch.empty(rows, vocabulary, dtype=plan.logits, device=device)
        self.u = torch.empty_like(self.z_t)
        self.gradient = self.u if plan.product == plan.logits else torch.empty_like(self.u, dtype=plan.product)
        self.block = block_rows(device, rows, vocabulary)
        self._work: Tensor | None = None
        if device.type == "cpu":
            count = 4 if plan.rounded else 2
            self._work = torch.empty(count, min(self.block, rows), vocabulary, dtype=plan.accumulate)
        self._hidden: tuple[Tensor, Tensor] | None = None

    def fill(self, candidate: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Raw head products of a chunk: (reference, candidate or difference to it, room for the gradient)."""
        plan, count = self.plan, len(candidate)
        z_t, u = self.z_t[:count], self.u[:count]
        if plan.form != "difference":
            logits_product(reference, plan.reference_head.rows, z_t)
            logits_product(candidate, plan.head.rows, u)
            return z_t, u, self.gradient[:count]
        weight = plan.head.rows
        difference = candidate.to(plan.accumulate) - reference.to(plan.accumulate)
        if plan.rounded:
            reference = reference.to(plan.product)
            self._hidden = reference, difference
        logits_product(reference, weight, z_t)
        logits_product(difference.to(plan.product), weight, u)
        return z_t, u, self.gradient[:count]

    def blocks(self, z_t: Tensor, u: Tensor, gold: Tensor | None = None) -> Iterator[RowBlock]:
        """Blocks of rows of a filled chunk. With gold ids [n], those and the candidate's likeliest are refined too."""
        for start in range(0, len(z_t), self.block):
            rows = slice(start, min(start + self.block, len(z_t)))
            block_z, block_u, scratch = self._block(z_t[rows], u[rows])
            if self.plan.form != "difference":
                yield self._direct(rows, block_z, block_u, scratch)
                continue
            block_z, block_u = affine_(block_z, self.plan.head), scaled_(block_u, self.plan.head)
            refined = None
            if self._hidden is not None:
                reference, difference = self._hidden
                refined = refine_(
                    block_z,
                    block_u,
                    self.plan.head,
                    reference[rows],
                    difference[rows],
                    None if gold is None else gold[rows],
                    gold is not None,
                )
            yield RowBlock(rows, *self._capped(block_z, block_u), refined, scratch)

    def _block(self, z_t: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows of a chunk in the dtype of row-wise work (themselves where they have it), and scratch."""
        if self._work is None:
            return z_t.to(self.plan.accumulate), u.to(self.plan.accumulate), None
        work = self._work[:, : len(z_t)]
        return (work[2].copy_(z_t), work[3].copy_(u), work[:2]) if self.plan.rounded else (z_t, u, work)

    def reference_blocks(self, reference: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of rows of the reference's final logits alone."""
        z_t = logits_product(reference, self.plan.reference_head.rows, self.z_t[: len(reference)])
        for start in range(0, len(z_t), self.block):
            rows = slice(start, min(start + self.block, len(z_t)))
            block = z_t[rows].to(self.plan.accumulate)
            yield rows, final_logits(block, self.plan.reference_head, self.plan.options.temperature)[0]

    def _direct(self, rows: slice, x_t: Tensor, x_s: Tensor, scratch: Tensor | None) -> RowBlock:
        plan, temperature = self.plan, self.plan.options.temperature
        z_t, _ = final_logits(x_t, plan.reference_head, temperature)
        z_s, slope = final_logits(x_s, plan.head, temperature)
        return RowBlock(rows, z_t, z_s.sub_(z_t), slope, None, scratch)

    def _capped(self, z_t: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Softcap and temperature of z_t and u = z_s − z_t, and the softcap's slope at z_s."""
        cap, temperature = self.plan.head.softcap, self.plan.options.temperature
        if cap is None:
            return (z_t, u, None) if temperature == 1.0 else (z_t.div_(temperature), u.div_(temperature), None)
        # tanh a − tanh b = tanh(a − b) · (1 − tanh a · tanh b): the difference survives the cap without cancellation.
        tanh_s, tanh_t = torch.tanh((z_t + u) / cap), torch.tanh(z_t / cap)
        u = torch.tanh(u / cap) * (1 - tanh_t * tanh_s)
        return tanh_t * (cap / temperature), u * (cap / temperature), 1 - tanh_s * tanh_s


def block_rows(device: torch.device, rows: int, vocabulary: int) -> int:
    """Rows whose row-wise work is done at a time, so that its temporaries are small beside a chunk of ``rows``."""
    if device.type == "cpu":
        return max(torch.get_num_threads(), BLOCK_BYTES // (4 * vocabulary))
    return max(GPU_BLOCK_ROWS, rows // 8)


def affine_(x: Tensor, head: Head) -> Tensor:
    """scale * (x + bias), in place."""
    if head.offsets is not None:
        x.add_(head.offsets)
    return scaled_(x, head)


def scaled_(x: Tensor, head: Head) -> Tensor:
    """scale * x, in place."""
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
    """Per-token divergence [N] and its gradient by the candidate's hidden states [N, D] (both ``plan.accumulate``).

    Where logits are kept in 16 bits, rows whose divergence is large are computed again with float32 products.
    """
    value = torch.empty(len(candidate), dtype=plan.accumulate, device=candidate.device)
    gradient = torch.empty(candidate.shape, dtype=plan.accumulate, device=candidate.device) if want_gradient else None
    if len(candidate) == 0:
        return value, gradient
    if not plan.rounded:
        _fill_rows(plan, candidate, reference, value, gradient)
        return value, gradient
    # The first chunk says whether most rows are large: then 16-bit products would be wasted on the others.
    probe = min(plan.rows_per_chunk, len(candidate))
    _fill_rows(
        plan, candidate[:probe], reference[:probe], value[:probe], None if gradient is None else gradient[:probe]
    )
    limit = plan.options.formula.at_kl(ROUNDED_LIMIT)
    precise = plan.precise
    rest_plan = precise if bool((value[:probe] > limit).float().mean() > 0.5) else plan
    if len(candidate) > probe:
        rest_gradient = None if gradient is None else gradient[probe:]
        _fill_rows(rest_plan, candidate[probe:], reference[probe:], value[probe:], rest_gradient)
    again = value > limit
    if rest_plan is precise:
        again[probe:] = False
    rows = again.nonzero()[:, 0]
    if len(rows):
        new_value, new_gradient = value_and_hidden_gradient(precise, candidate[rows], reference[rows], want_gradient)
        value[rows] = new_value
        if gradient is not None and new_gradient is not None:
            gradient[rows] = new_gradient
    return value, gradient


def _fill_rows(plan: Plan, candidate: Tensor, reference: Tensor, value: Tensor, gradient: Tensor | None) -> None:
    """Writes value [N] and, unless None, gradient [N, D], chunk by chunk."""
    divergence, factor = plan.options.formula, plan.head.scale / plan.options.temperature
    chunks, row_work = LogitChunks(plan, candidate.device, len(candidate)), row_function(plan.options.rows)
    rows_per_chunk = balanced(len(candidate), plan.rows_per_chunk)
    for start in range(0, len(candidate), rows_per_chunk):
        part = slice(start, start + rows_per_chunk)
        z_t, u, out = chunks.fill(candidate[part], reference[part])
        rescale, scale = None, torch.full((len(u), 1), factor, dtype=plan.accumulate, device=u.device)
        if gradient is not None and plan.product == torch.float16:
            rescale = torch.empty(len(u), 1, dtype=plan.accumulate, device=u.device)
        for block in chunks.blocks(z_t, u):
            rows = block.rows
            work = row_work(block.z_t, block.u, divergence, gradient is not None, block.center, block.scratch)
            value[part][rows] = work.value
            if work.gradient is not None:
                _store_gradient(work.gradient, block.slope, out[rows], None if rescale is None else rescale[rows])
                if work.scale is not None:
                    scale[rows] *= work.scale[:, None]
        if gradient is not None:
            product = gradient_product(out, plan.head.rows)
            gradient[part] = (product if rescale is None else product * rescale) * scale


def balanced(tokens: int, most: int) -> int:
    """Rows per chunk, at most ``most``, so that no small remainder is left over."""
    chunks = -(-tokens // most)
    return -(-tokens // chunks)


def _store_gradient(gradient: Tensor, slope: Tensor | None, out: Tensor, rescale: Tensor | None) -> None:
    """Writes dL/d(raw product); float16 rows are stored relative to their largest entry, or they would underflow."""
    if slope is not None:
        gradient = gradient * slope
    if rescale is not None:
        torch.amax(gradient.abs(), -1, keepdim=True, out=rescale)
        gradient = gradient / rescale.clamp_(min=torch.finfo(torch.float32).tiny)
    out.copy_(gradient)


def all_gradients(
    plan: Plan, candidate: Tensor, reference: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of Σ upstream · divergence by hidden states [N, D], weight [V', D] and bias [V'] (padding rows 0).

    Logits and their gradients are float32 throughout.
    """
    plan = plan.precise
    options, head = plan.options, plan.head
    by_hidden = torch.zeros(candidate.shape, dtype=plan.accumulate, device=candidate.device)
    by_weight = torch.zeros(head.weight.shape, dtype=plan.accumulate, device=candidate.device)
    by_bias = None if head.bias is None else torch.zeros_like(head.bias, dtype=plan.accumulate)
    if len(candidate) == 0:
        return by_hidden, by_weight, by_bias
    chunks, row_work = LogitChunks(plan, candidate.device, len(candidate)), row_function(options.rows)
    divergence, factor = options.formula, head.scale / options.temperature
    for start in range(0, len(candidate), plan.rows_per_chunk):
        part = slice(start, start + plan.rows_per_chunk)
        z_t, u, out = chunks.fill(candidate[part], reference[part])
        weights = (upstream[part] * factor).to(plan.accumulate)[:, None]
        for block in chunks.blocks(z_t, u):
            work = row_work(block.z_t, block.u, divergence, True, block.center, block.scratch)
            assert work.gradient is not None
            slope, row_weights = block.slope, weights[block.rows]
            if work.scale is not None:
                row_weights = row_weights * work.scale[:, None]
            out[block.rows] = (work.gradient if slope is None else work.gradient * slope) * row_weights
        by_hidden[part] = gradient_product(out, head.rows)
        by_weight[: head.size].addmm_(out.T, candidate[part].to(plan.accumulate))
        if by_bias is not None:
            by_bias[: head.size] += out.sum(0)
    return by_hidden, by_weight, by_bias
