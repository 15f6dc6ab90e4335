"""Random problems and error measures shared by the tests of the divergence op."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvopt.kernels import Head, KLOptions, linear_kl
from kvopt.kernels.divergences import divergences
from kvopt.kernels.float64 import linear_kl64, logits64

DIVERGENCES = tuple(divergences())
"""Every registered divergence: what the tests run for one, they run for all."""

DISTANCE_FOR_KL = {1e-6: 5e-4, 1e-3: 1.6e-2, 1e-1: 0.16, 5.0: 1.4}
"""Noise on the hidden states of ``problem`` that gives about this forward KL."""


class Problem(NamedTuple):
    candidate: Tensor
    reference: Tensor
    head: Head


def problem(
    distance: float, dtype: torch.dtype, *, n: int = 37, d: int = 96, v: int = 5003, seed: int = 0, **head: Any
) -> Problem:
    """Ragged sizes, logits of standard deviation about 3; candidate = reference + distance · noise."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(v, d, generator=generator) * 3 / d**0.5).to(dtype)
    reference = torch.randn(n, d, generator=generator)
    candidate = reference + distance * torch.randn(n, d, generator=generator)
    return Problem(candidate.to(dtype), reference.to(dtype), Head(weight, **head))


def relative(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖ (Frobenius, float64)."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).norm() / expected.norm()).item()


class Errors(NamedTuple):
    kl: float
    gradient: float
    mean_kl: float
    gradient_norm: float


def errors(p: Problem, options: KLOptions, reference_head: Head | None = None) -> Errors:
    """Worst relative error of a token's divergence and relative error of the gradient, against float64, whose mean
    divergence and norm of the gradient are given too."""
    actual = p.candidate.clone().requires_grad_()
    expected = p.candidate.double().requires_grad_()
    upstream = (torch.rand(len(actual), generator=torch.Generator().manual_seed(7)) + 0.5).to(actual.device)
    kl = linear_kl(actual, p.reference, p.head, reference_head, options).kl
    kl64 = linear_kl64(expected, p.reference, p.head, reference_head or p.head, options)
    (kl * upstream).sum().backward()
    (kl64 * upstream).sum().backward()
    assert actual.grad is not None
    assert expected.grad is not None
    worst = ((kl.detach() - kl64.detach()) / kl64.detach()).abs().max().item()
    return Errors(worst, relative(actual.grad, expected.grad), kl64.mean().item(), expected.grad.norm().item())


class Scores64(NamedTuple):
    """What ``linear_scores`` gives, [N] each, in float64 (agree: bool)."""

    kl: Tensor
    nll: Tensor
    reference_nll: Tensor
    agree: Tensor
    entropy: Tensor


@torch.no_grad()
def linear_scores64(
    candidate_hidden: Tensor, reference_hidden: Tensor, head: Head, gold_ids: Tensor, options: KLOptions
) -> Scores64:
    """[N] each, float64 (agree: bool); negative log-likelihoods are those of the gold ids."""
    log_p = logits64(reference_hidden, head, options.temperature).log_softmax(-1)
    log_q = logits64(candidate_hidden, head, options.temperature).log_softmax(-1)
    gold = gold_ids[:, None]
    return Scores64(
        options.formula.exact(log_p, log_q),
        -log_q.gather(1, gold)[:, 0],
        -log_p.gather(1, gold)[:, 0],
        log_p.argmax(-1) == log_q.argmax(-1),
        -(log_p.exp() * log_p).sum(-1),
    )
