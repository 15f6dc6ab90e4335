"""The row-wise work on its own, against float64: every path, also those that a CPU takes seldom."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvopt.kernels.divergences import Divergence, divergences
from kvopt.kernels.rows import RowWork, divergence_rows, divergence_rows_any_size, normalize_
from tests.kernels.cases import DIVERGENCES, relative


def logits(size: float, common: float = 0.0) -> tuple[Tensor, Tensor]:
    """z_t and u = z_s − z_t [9, 3001], u about ``size`` large plus a number common to all tokens of a row."""
    generator = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(9, 3001, generator=generator)
    return z, size * torch.randn(9, 3001, generator=generator) + common


def exact(z: Tensor, u: Tensor, formula: Divergence) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient by z_s, and log Z_s − log Z_t, in float64."""
    z_t, z_s = z.double(), (z.double() + u.double()).requires_grad_()
    value = formula.exact(z_t.log_softmax(-1), z_s.log_softmax(-1))
    (gradient,) = torch.autograd.grad(value.sum(), z_s)
    return value.detach(), gradient, (z_s.logsumexp(-1) - z_t.logsumexp(-1)).detach()


def whole_gradient(work: RowWork) -> Tensor:
    assert work.gradient is not None
    return work.gradient if work.scale is None else work.gradient * work.scale[:, None]


@pytest.mark.parametrize("work", [divergence_rows, divergence_rows_any_size])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("size", "common"), [(1.4e-3, 0.0), (1.4e-3, 2.0), (0.3, -7.0), (3.0, 1.0), (12.0, 0.0)])
def test_value_gradient_and_shift(work, divergence, size, common):
    (z, u), formula = logits(size, common), divergences()[divergence](0.3)
    value, gradient, shift = exact(z, u, formula)
    actual = work(z.clone(), u.clone(), formula, True)
    assert ((actual.value - value) / value).abs().max() <= 2e-3
    assert relative(whole_gradient(actual), gradient) <= 1e-3
    assert (actual.shift - shift).abs().max() <= 1e-5
    assert work(z.clone(), u.clone(), formula, False).gradient is None


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_token_that_only_the_candidate_expects(divergence):
    (z, u), formula = logits(0.1), divergences()[divergence](0.3)
    z[:, 7], u[:, 7] = -45.0, 60.0
    value, gradient, shift = exact(z, u, formula)
    actual = divergence_rows(z.clone(), u.clone(), formula, True)
    assert ((actual.value - value) / value).abs().max() <= 1e-4
    assert relative(whole_gradient(actual), gradient) <= 1e-4
    assert relative(actual.shift, shift) <= 1e-5


def test_probabilities_partition_and_entropy():
    z, u = logits(1.0)
    z = z + 40 * u[:, :1]
    log_p = z.double().log_softmax(-1)
    p = z.clone()
    log_partition, entropy = normalize_(p)
    assert relative(p, log_p.exp()) <= 1e-6
    assert relative(log_partition, z.double().logsumexp(-1)) <= 1e-6
    assert relative(entropy, -(log_p.exp() * log_p).sum(-1)) <= 1e-5
