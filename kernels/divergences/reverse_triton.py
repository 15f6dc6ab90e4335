# mypy: disable-error-code="no-untyped-def"
"""Reverse KL in Triton: one sum over the vocabulary, L = Σ q d."""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401 (the interpreter wants to see it in the file)


@triton.jit
def summands(p, moved, d, beta):
    """q d, and nothing."""
    return (p + moved) * d, 0.0


@triton.jit
def value(kl, first, second, beta):
    """L."""
    return first


@triton.jit
def gradient(p, moved, d, first, second, beta):
    """q (d − L)."""
    return (p + moved) * (d - first)
