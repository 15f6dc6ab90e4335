"""The device that the tests in this folder run on: ``KVOPT_TEST_DEVICE`` (default: cpu).

On the CPU, which is what the normal test suite uses, they check themselves; on a GPU only the device is new.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kvopt.base.loading import Base, load_base
from kvopt.config.model import ModelConfig
from kvopt.kernels import Head
from tests.kernels import cases
from tests.kernels.cases import Problem
from tests.tiny import tiny_folder

DEVICE = torch.device(os.environ.get("KVOPT_TEST_DEVICE", "cpu"))
ON_GPU = DEVICE.type == "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RAGGED = {"n": 150, "d": 70, "v": 2201}
"""No multiple of a block of any kernel (128 rows, 64 columns, 32 features, 1024 logits), and larger than each."""


def problem(distance: float, dtype: torch.dtype, **changes: Any) -> Problem:
    """``tests.kernels.cases.problem`` of ragged sizes on the device."""
    p = cases.problem(distance, dtype, **{**RAGGED, **changes})
    return Problem(p.candidate.to(DEVICE), p.reference.to(DEVICE), on_device(p.head))


def on_device(head: Head) -> Head:
    """The same head on the device."""
    return replace(head, weight=head.weight.to(DEVICE), bias=None if head.bias is None else head.bias.to(DEVICE))


def random(*shape: int, seed: int = 1) -> Tensor:
    """Normal numbers that are the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@cache
def base_on_device(kind: str, dtype: str = "float32") -> Base:
    """A tiny base of ``tests.tiny`` on the device. Shared by all callers: do not change it."""
    return load_base(ModelConfig(base=str(tiny_folder(kind)), dtype=dtype, device=str(DEVICE)))  # type: ignore[arg-type]


def require(device: torch.device) -> None:
    """Raises RuntimeError for a GPU that was asked for and is not there: that is a failure, never a skip."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"KVOPT_TEST_DEVICE is {device}, and torch {torch.__version__} sees no CUDA device")
