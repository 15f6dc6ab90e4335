# mypy: disable-error-code="no-untyped-def"
"""JSD_β in Triton: two sums over the vocabulary, Σ q a and Σ p s (jsd.py has the formula)."""

from __future__ import annotations

import triton
import triton.language as tl

from kvopt.kernels.divergences import registry
from kvopt.kernels.triton_kernels import log1p, phi

LARGE_LOG_RATIO = tl.constexpr(registry.LARGE_LOG_RATIO)


@triton.jit
def log_mixture(d, beta):
    """(s, a) = (log m − log p, log q − log m) for m = β p + (1 − β) q."""
    y = (1.0 - beta) * tl.where(tl.abs(d) < 0.5, d + phi(d), tl.exp(tl.minimum(d, LARGE_LOG_RATIO)) - 1.0)
    s = tl.where(d < LARGE_LOG_RATIO, log1p(y), d + tl.log(1.0 - beta))
    return s, d - s


@triton.jit
def summands(p, moved, d, beta):
    """q a and p s."""
    s, a = log_mixture(d, beta)
    return (p + moved) * a, p * s


@triton.jit
def value(kl, first, second, beta):
    """(1−β) Σ q a − β Σ p s."""
    return (1.0 - beta) * first - beta * second


@triton.jit
def gradient(p, moved, d, first, second, beta):
    """(1−β) q (a − Σ q a)."""
    _, a = log_mixture(d, beta)
    return (1.0 - beta) * (p + moved) * (a - first)
