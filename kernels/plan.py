"""Checks what the op was given and decides form, backend, dtypes and chunk size, in one place and before any work."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from kvopt.kernels.options import Head, KernelInputError, KLOptions, UnsupportedError
from kvopt.kernels.table import best_use, device_kind

CPU_CHUNK_BYTES = 96 * 2**20
"""For float32 logits; 16-bit ones get the same rows. More rows do not multiply faster, and buffers over 32 MiB are
given back to the system by the allocator, so that each call pays for their page faults."""
GPU_CHUNK_BYTES = 512 * 2**20
GPU_MIN_ROWS = 1024


@dataclass(frozen=True)
class Plan:
    """Everything a backend needs to know that is not data.

    Args:
        form: "direct" or "difference".
        backend: "reference", "torch" or "triton".
        accumulate: dtype of all row-wise work: float32, or float64 for float64 inputs.
        logits: dtype in which products are kept between product and row-wise work. 16-bit only on a CPU, whose 16-bit
            products cannot return float32; the likeliest tokens are then refined (refine.py).
        product: dtype of the operands of the difference and gradient products; 16-bit only in the difference form.
        rows_per_chunk: tokens whose logits exist at the same time.
        store_free: whether Triton's store-free kernels serve it (triton backend only).
    """

    form: str
    backend: str
    accumulate: torch.dtype
    logits: torch.dtype
    product: torch.dtype
    rows_per_chunk: int
    options: KLOptions
    head: Head
    reference_head: Head
    store_free: bool = False

    @property
    def rounded(self) -> bool:
        """Whether logits are kept in 16 bits, so that the likeliest tokens need refining."""
        return self.logits != self.accumulate

    @property
    def precise(self) -> Plan:
        """The same with every product in ``accumulate``, in chunks that fit the same budget."""
        device = self.head.weight.device
        rows = rows_per_chunk(device, self.head.size, self.accumulate, self.accumulate, self.options)
        return replace(self, logits=self.accumulate, product=self.accumulate, rows_per_chunk=rows, store_free=False)


def make_plan(
    candidate_hidden: Tensor,
    reference: Tensor,
    head: Head,
    reference_head: Head,
    options: KLOptions,
) -> Plan:
    """Checks hidden states against heads and options, and decides everything else."""
    _check_hidden(candidate_hidden, head, "candidate_hidden", "head")
    _check_hidden(reference, reference_head, "reference_hidden", "reference_head")
    if reference.shape[0] != candidate_hidden.shape[0]:
        raise KernelInputError(
            f"candidate_hidden has {candidate_hidden.shape[0]} tokens and reference_hidden {reference.shape[0]};"
            " both need one row per gold token, in the same order"
        )
    if reference.device != candidate_hidden.device:
        raise KernelInputError(
            f"reference_hidden is on {reference.device}, candidate_hidden on"
            f" {candidate_hidden.device}; move one of them"
        )
    if head.size != reference_head.size:
        raise KernelInputError(
            f"the heads have {head.size} and {reference_head.size} vocabulary rows; if the rest is padding, give"
            " Head(vocab=…) the number of real tokens"
        )
    form = choose_form(head, reference_head, options)
    tensors = [candidate_hidden, head.weight, reference_head.weight, reference]
    accumulate = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    product = _product_dtype(candidate_hidden, head, form, accumulate, options)
    use = _table_use(candidate_hidden, head, options)
    backend = _choose_backend(candidate_hidden, accumulate, options, use)
    store_free = backend == "triton" and _choose_store_free(head, form, product, options, use)
    if options.rows == "auto":
        options = replace(options, rows="compiled" if use == "torch compiled rows" else "eager")
    logits = product if candidate_hidden.device.type == "cpu" else accumulate
    rows = rows_per_chunk(candidate_hidden.device, head.size, logits, product, options)
    return Plan(form, backend, accumulate, logits, product, rows, options, head, reference_head, store_free)


def _check_hidden(hidden: Tensor, head: Head, name: str, head_name: str) -> None:
    if hidden.dim() != 2:
        raise KernelInputError(f"{name} has shape {tuple(hidden.shape)}; it must be [N, D], one row per gold token")
    if not hidden.is_floating_point():
        raise KernelInputError(f"{name} is {hidden.dtype}; it must be a floating-point tensor of hidden states")
    if hidden.shape[1] != head.weight.shape[1]:
        raise KernelInputError(
            f"{name} has {hidden.shape[1]} features and {head_name}.weight {head.weight.shape[1]};"
            " give each model's own head (head=…, reference_head=…)"
        )
    if hidden.device != head.weight.device:
        raise KernelInputError(f"{name} is on {hidden.device} and {head_name}.weight on {head.weight.device}")


def choose_form(head: Head, reference_head: Head, options: KLOptions) -> str:
    """Difference where the head is shared, else direct."""
    shared = head.same_as(reference_head)
    if options.form == "auto":
        return "difference" if shared else "direct"
    if options.form == "moments":
        raise UnsupportedError(
            'form="moments" takes a stored reference: make one with moments_of(reference_hidden, head)'
        )
    if options.form == "difference" and not shared:
        raise UnsupportedError('form="difference" needs one head shared by candidate and reference; use form="direct"')
    return options.form


def _table_use(hidden: Tensor, head: Head, options: KLOptions) -> str:
    """What the table says; where Triton is interpreted, on the CPU, it stands for a GPU."""
    kind = device_kind(hidden.device)
    if kind == "cpu" and options.backend.startswith("triton"):
        kind = "cuda"
    return best_use(kind, hidden.shape[1], head.size)


def _choose_backend(hidden: Tensor, accumulate: torch.dtype, options: KLOptions, use: str) -> str:
    """What is asked for, else what the table says, if it is installed and serves the case; else torch."""
    problem = _triton_problem(hidden, accumulate)
    if options.backend.startswith("triton"):
        if problem:
            raise UnsupportedError(f'backend="{options.backend}" {problem}; use backend="torch"')
        return "triton"
    if options.backend != "auto":
        return options.backend
    return "triton" if use.startswith("triton") and not problem else "torch"


def _choose_store_free(head: Head, form: str, product: torch.dtype, options: KLOptions, use: str) -> bool:
    possible = (
        form == "difference"
        and head.softcap is None
        and options.formula.store_free
        and (product in (torch.bfloat16, torch.float16) or os.environ.get("TRITON_INTERPRET") == "1")
    )
    if options.backend == "triton-store-free" and not possible:
        raise UnsupportedError(
            'backend="triton-store-free" computes forward KL by difference, without a softcap, from 16-bit inputs;'
            ' use backend="triton-rows"'
        )
    return possible and (
        options.backend == "triton-store-free" or (options.backend != "triton-rows" and use == "triton store-free")
    )


def _triton_problem(hidden: Tensor, accumulate: torch.dtype) -> str | None:
    if hidden.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"needs a CUDA or ROCm device, and the hidden states are on {hidden.device}"
    if hidden.device.type != "cuda" and hidden.dtype == torch.bfloat16:
        return "is interpreted, and Triton's interpreter computes bfloat16 products wrongly"
    if find_spec("triton") is None:
        return "needs the triton package, which is not installed"
    if accumulate == torch.float64:
        return "does not compute in float64"
    return None


def _product_dtype(hidden: Tensor, head: Head, form: str, accumulate: torch.dtype, options: KLOptions) -> torch.dtype:
    """16-bit products of the difference keep the contract; those of direct logits do not (and fp16 is slow on CPUs)."""
    if options.products == "float32" or form != "difference" or accumulate == torch.float64:
        return accumulate
    if hidden.dtype != head.weight.dtype or hidden.dtype not in (torch.bfloat16, torch.float16):
        return accumulate
    if hidden.device.type == "cpu" and not (hidden.dtype == torch.bfloat16 and cpu_has_bfloat16_products()):
        return accumulate
    return hidden.dtype


@lru_cache
def cpu_has_bfloat16_products() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones (AVX512-BF16, AMX, Arm BF16)."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if capabilities:
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16"))
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


def rows_per_chunk(
    device: torch.device, vocabulary: int, logits: torch.dtype, product: torch.dtype, options: KLOptions
) -> int:
    """Tokens per chunk so that both logit buffers fit the budget; by default at least 16 on a CPU, 1,024 on a GPU."""
    on_cpu = device.type == "cpu"
    budget = options.chunk_bytes or (CPU_CHUNK_BYTES if on_cpu else GPU_CHUNK_BYTES)
    if on_cpu and not options.chunk_bytes:
        budget = budget * logits.itemsize // torch.float32.itemsize
    rows = budget // (vocabulary * (2 * logits.itemsize + (product.itemsize if product != logits else 0)))
    floor = 1 if options.chunk_bytes else 16 if on_cpu else GPU_MIN_ROWS
    return max(floor, rows)
