"""Triton by ``auto`` only where its kernels were seen to work: once for each device, version and kernel, 64 tokens are
computed by it and by the torch backend.

A kernel that does not compile, asks for more shared memory than the GPU has (Turing: 64 KiB), fails or gives other
numbers is not taken: the torch backend is, with one warning. What was found is kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import warnings
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvopt.kernels import torch_backend
from kvopt.kernels.options import Head
from kvopt.kernels.plan import Plan
from kvopt.kernels.table import CONTRACT
from kvopt.kernels.user_files import read_mapping, user_file, write_mapping

TOKENS, FEATURES, VOCABULARY = 64, 96, 1500
"""No multiple of a kernel's blocks but for the tokens."""
DISTANCE = 0.3
"""Noise on hidden states, for a KL of about 0.04 nats."""
CHECKS = "triton.json"

_known: dict[str, str | None] = {}


def trusted(plan: Plan, dtype: torch.dtype) -> Plan:
    """The plan, or with the torch backend where ``auto`` chose Triton and it does not work.

    Args:
        dtype: of the candidate's hidden states.
    """
    if plan.backend != "triton" or plan.options.backend != "auto":
        return plan
    if triton_fault(plan, dtype) is None:
        return plan
    return replace(plan, backend="torch", store_free=False)


def triton_fault(plan: Plan, dtype: torch.dtype) -> str | None:
    """Why Triton's kernel for such a plan is not to be used, None where it works."""
    device = plan.head.weight.device
    kernel = "store-free" if plan.store_free else "rows"
    capped = plan.head.softcap is not None, plan.reference_head.softcap is not None
    what = [kernel, plan.options.divergence, plan.form, dtype, plan.head.weight.dtype, plan.product, capped]
    key = " | ".join(map(str, [*_machine(device), *what]))
    if key in _known:
        return _known[key]
    path = user_file(CHECKS)
    stored = read_mapping(path)
    if key in stored:
        fault = stored[key]
    else:
        fault, lasting = _fault(plan, dtype)
        if lasting:
            with suppress(OSError):  # a cache that cannot be written only costs time
                write_mapping(path, read_mapping(path) | {key: fault})
    _known[key] = fault
    if fault is not None:
        warnings.warn(f"the {kernel} kernel of Triton is not used on {device}: {fault}; torch is", stacklevel=4)
    return fault


@lru_cache
def _machine(device: torch.device) -> tuple[str, ...]:
    """What a finding holds for: the device, the libraries, and the kernels' own text."""
    name = "cpu"
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "unknown"
    digest = hashlib.sha256()
    for part in ("triton_kernels.py", "triton_backend.py"):
        digest.update(Path(__file__).with_name(part).read_bytes())
    return name, f"torch {torch.__version__}", f"triton {triton}", digest.hexdigest()[:16]


def _fault(plan: Plan, dtype: torch.dtype) -> tuple[str | None, bool]:
    """What is wrong with 64 tokens by Triton, and whether that will be so next time."""
    small, candidate, reference = _problem(plan, dtype)
    expected = torch_backend.value_and_hidden_gradient(replace(small, backend="torch"), candidate, reference, True)
    try:
        found = _triton_backend().value_and_hidden_gradient(small, candidate, reference, True)
        errors = [_relative(ours, theirs) for ours, theirs in zip(found, expected, strict=True)]
    except torch.OutOfMemoryError:
        return "there was no memory to try it", False
    except Exception as error:  # compilers and drivers fail in their own ways; the reason is kept
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", True
    worst = max(errors)
    return (None if worst <= CONTRACT else f"its numbers are off by {worst:.1e}"), True


def _triton_backend() -> Any:
    from kvopt.kernels import triton_backend

    return triton_backend


def _problem(plan: Plan, dtype: torch.dtype) -> tuple[Plan, Tensor, Tensor]:
    """The plan for a small problem with heads like its own, and hidden states of both sides."""
    device, generator = plan.head.weight.device, torch.Generator().manual_seed(0)

    def normal(*shape: int, like: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, like)

    def alike(head: Head) -> Head:
        weight = normal(VOCABULARY, FEATURES, like=torch.float32) / FEATURES**0.5
        bias = None if head.bias is None else normal(VOCABULARY, like=head.bias.dtype)
        return replace(head, weight=weight.to(head.weight.dtype), bias=bias, vocab=None)

    head = alike(plan.head)
    other = head if plan.form == "difference" else alike(plan.reference_head)
    reference = normal(TOKENS, FEATURES, like=torch.float32)
    candidate = reference + DISTANCE * normal(TOKENS, FEATURES, like=torch.float32)
    small = replace(plan, head=head, reference_head=other, rows_per_chunk=TOKENS)
    return small, candidate.to(dtype), reference.to(dtype)


def _relative(ours: Tensor | None, theirs: Tensor | None) -> float:
    assert ours is not None
    assert theirs is not None
    error = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
    return error if error == error else float("inf")
