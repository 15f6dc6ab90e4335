"""Launches the Triton kernels: head products by the vendor's library plus a fused row kernel, or store-free tiles.

Large D: chunks of tokens, logits as float32 sums, one row kernel that makes value and gradient out of them.
Small D: the logits of a tile cost less to compute twice than to write and read back, so none is ever written: a
statistics kernel over shares of the vocabulary, then a kernel that writes the gradient alone, in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import triton
from torch import Tensor

from kvopt.kernels.divergences import row_functions
from kvopt.kernels.options import Head
from kvopt.kernels.plan import Plan
from kvopt.kernels.products import gradient_product, logits_product
from kvopt.kernels.triton_kernels import gradient_kernel, rows_kernel, statistics_kernel


@dataclass(frozen=True)
class Tile:
    """Block sizes of the store-free kernels; compiled without spills for sm_80, sm_90, sm_100 and gfx942."""

    rows: int = 128
    cols: int = 64
    depth: int = 32
    warps: int = 8
    stages: int = 3

    def arguments(self) -> dict[str, int]:
        """As the kernels take them."""
        return {
            "ROWS": self.rows, "COLS": self.cols, "DEPTH": self.depth, "num_warps": self.warps,
            "num_stages": self.stages,
        }  # fmt: skip


def tile_for(amd: bool) -> Tile:
    """The tile of a device, given its vendor."""
    return Tile(stages=2) if amd else Tile()


TILE = tile_for(torch.version.hip is not None)
ROW_BLOCK = 1024
ROW_WARPS = 8


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function(plan, candidate, …)`` with the candidate's GPU as the current one: Triton launches on that, whatever
    GPU the tensors are on.
    """

    @wraps(function)
    def guarded(plan: Plan, candidate: Tensor, *args: Any, **options: Any) -> Any:
        on_gpu = candidate.device.type == "cuda"
        with torch.cuda.device(candidate.device) if on_gpu else nullcontext():
            return function(plan, candidate, *args, **options)

    return guarded


@_on_its_device
def value_and_hidden_gradient(
    plan: Plan, candidate: Tensor, reference: Tensor, want_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Per-token divergence [N] and its gradient by the candidate's hidden states [N, D], float32."""
    count = len(candidate)
    value = torch.empty(count, dtype=torch.float32, device=candidate.device)
    gradient = torch.empty(candidate.shape, dtype=torch.float32, device=candidate.device) if want_gradient else None
    if count == 0:
        return value, gradient
    if plan.store_free:
        _store_free(plan, candidate, reference, value, gradient)
        return value, gradient
    for part, by_product, rescale in _row_chunks(plan, candidate, reference, value, want_gradient):
        if gradient is not None:
            product = gradient_product(by_product, plan.head.rows)
            gradient[part] = product * (rescale * (plan.head.scale / plan.options.temperature))
    return value, gradient


@_on_its_device
def all_gradients(
    plan: Plan, candidate: Tensor, reference: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As ``torch_backend.all_gradients``: by hidden states, weight and bias, all float32, with the fused row kernel."""
    plan = plan.precise
    head, device = plan.head, candidate.device
    value = torch.empty(len(candidate), dtype=torch.float32, device=device)
    by_hidden = torch.zeros(candidate.shape, dtype=torch.float32, device=device)
    by_weight = torch.zeros(head.weight.shape, dtype=torch.float32, device=device)
    by_bias = None if head.bias is None else torch.zeros_like(head.bias, dtype=torch.float32)
    weights = upstream.float()[:, None] * (head.scale / plan.options.temperature)
    for part, by_product, _ in _row_chunks(plan, candidate, reference, value, True):
        by_product.mul_(weights[part])
        by_hidden[part] = gradient_product(by_product, head.rows)
        by_weight[: head.size].addmm_(by_product.T, candidate[part].float())
        if by_bias is not None:
            by_bias[: head.size] += by_product.sum(0)
    return by_hidden, by_weight, by_bias


def _row_chunks(
    plan: Plan, candidate: Tensor, reference: Tensor, value: Tensor, want_gradient: bool
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Fills ``value`` chunk by chunk; yields (tokens, gradient by raw products [R, V] / rescale, rescale [R, 1])."""
    if len(candidate) == 0:
        return
    head, teacher, options = plan.head, plan.reference_head, plan.options
    rows, vocabulary, device = min(plan.rows_per_chunk, len(candidate)), head.size, candidate.device
    x_t = torch.empty(rows, vocabulary, dtype=torch.float32, device=device)
    x_s = torch.empty_like(x_t)
    room = x_s if plan.product == torch.float32 else torch.empty_like(x_s, dtype=plan.product)
    rescale = torch.ones(rows, dtype=torch.float32, device=device)
    unused = rescale
    scale_t, cap_t = _scale_and_cap(teacher, options.temperature)
    scale_s, cap_s = _scale_and_cap(head, options.temperature)
    for start in range(0, len(candidate), rows):
        part = slice(start, start + rows)
        h_s, h_t = candidate[part], reference[part]
        n = len(h_s)
        if plan.form == "difference":
            h_s = (h_s.float() - h_t.float()).to(plan.product)
        logits_product(h_t, teacher.rows, x_t[:n])
        logits_product(h_s, head.rows, x_s[:n])
        rows_kernel[(n,)](
            x_t, x_s, room, value[part], rescale,
            unused if teacher.offsets is None else teacher.offsets, unused if head.offsets is None else head.offsets,
            scale_t, scale_s, cap_t, cap_s, options.beta, vocabulary, vocabulary, vocabulary,
            DIFFERENCE=plan.form == "difference", BIAS_T=teacher.offsets is not None, BIAS_S=head.offsets is not None,
            CAP_T=teacher.softcap is not None, CAP_S=head.softcap is not None,
            GRADIENT=want_gradient, RESCALE=plan.product == torch.float16, BLOCK=ROW_BLOCK, num_warps=ROW_WARPS,
            **row_constants(options.divergence),
        )  # fmt: skip
        yield part, room[:n], rescale[:n, None]


def row_constants(divergence: str) -> dict[str, Any]:
    """The divergence's own functions as ``rows_kernel`` takes them."""
    functions = row_functions(divergence)
    return {"SUMMANDS": functions.summands, "VALUE_OF": functions.value, "GRADIENT_OF": functions.gradient}


def _scale_and_cap(head: Head, temperature: float) -> tuple[float, float]:
    """The factors before and after a softcap's tanh; without one, the factor on raw products, and 1."""
    if head.softcap is None:
        return head.scale / temperature, 1.0
    return head.scale / head.softcap, head.softcap / temperature


def _store_free(plan: Plan, candidate: Tensor, reference: Tensor, value: Tensor, gradient: Tensor | None) -> None:
    head, options = plan.head, plan.options
    scale, count, vocabulary = head.scale / options.temperature, len(candidate), head.size
    weight = head.rows.contiguous().to(plan.product)
    h_t = reference.contiguous().to(plan.product)
    delta = (candidate.float() - reference.float()).to(plan.product)
    sizes = TILE.arguments()
    bias = value if head.offsets is None else head.offsets.contiguous()
    lse, shift = torch.empty_like(value), torch.empty_like(value)
    splits, per_split = vocabulary_splits(count, vocabulary, candidate.device)
    partial = torch.empty(splits, 4, count, dtype=torch.float32, device=candidate.device)
    statistics_kernel[(triton.cdiv(count, TILE.rows), splits)](
        h_t, delta, weight, bias, partial, scale, scale, count, vocabulary, h_t.shape[1], h_t.stride(0),
        weight.stride(0), per_split, BIAS=head.offsets is not None, **sizes,
    )  # fmt: skip
    lse[:], mean, value[:] = merge_statistics(partial)
    torch.add(mean, value, out=shift)
    if gradient is None:
        return
    size = torch.ones_like(value)
    if plan.product == torch.float16:
        size = (2 * value.clamp(min=1e-14)).sqrt() / 1024
    factor = 1 / size
    rows = min(plan.rows_per_chunk, count)
    room = torch.empty(rows, vocabulary, dtype=plan.product, device=candidate.device)
    for start in range(0, count, rows):
        part = slice(start, min(start + rows, count))
        n = part.stop - start
        gradient_kernel[(triton.cdiv(n, TILE.rows), triton.cdiv(vocabulary, TILE.cols))](
            h_t[part], delta[part], weight, bias, lse[part], shift[part], factor[part], room, scale, scale, n,
            vocabulary, h_t.shape[1], h_t.stride(0), weight.stride(0), vocabulary, BIAS=head.offsets is not None,
            **sizes,
        )  # fmt: skip
        gradient[part] = gradient_product(room[:n], weight) * (size[part, None] * scale)


def vocabulary_splits(tokens: int, vocabulary: int, device: torch.device) -> tuple[int, int]:
    """(shares, tokens of the vocabulary per share): enough programs for about four waves on the device."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    tiles = triton.cdiv(vocabulary, TILE.cols)
    splits = max(1, min(tiles, 4 * processors // max(1, triton.cdiv(tokens, TILE.rows))))
    per_split = triton.cdiv(tiles, splits) * TILE.cols
    return triton.cdiv(vocabulary, per_split), per_split


def merge_statistics(partial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log Σ e^z_t, ū, forward KL), [N] each, from the statistics [splits, 4, N] of shares of the vocabulary."""
    top, mass, mean, second = partial.unbind(1)
    row_top = top.amax(0)
    mass = mass * torch.exp(top - row_top)
    total = mass.sum(0)
    share = mass / total
    row_mean = (share * mean).sum(0)
    move = (mean - row_mean).clamp(max=80.0)
    near = move * move / 2 * (1 + move / 3 * (1 + move / 4 * (1 + move / 5 * (1 + move / 6 * (1 + move / 7)))))
    phi = torch.where(move.abs() < 0.5, near, torch.expm1(move) - move)
    second = (share * ((torch.exp(move) * second).clamp(max=1e36) + phi)).sum(0)
    return row_top + total.log(), row_mean, torch.log1p(second)
