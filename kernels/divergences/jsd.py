"""Generalised Jensen–Shannon divergence JSD_β = β KL(p‖m) + (1−β) KL(q‖m), m = β p + (1−β) q.

Agarwal et al. 2023, arXiv 2306.13649. With s = log m − log p = log1p((1−β) expm1(d)) and a = log q − log m = d − s it
is (1−β) Σ q a − β Σ p s, and its gradient by z_s is (1−β) q (a − Σ q a).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvopt.kernels.divergences.registry import LARGE_LOG_RATIO, Divergence, Ratios


class JSD(Divergence):
    """JSD_β, with β = ``beta`` strictly between 0 and 1."""

    title = "JSD"

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise ValueError(
                f"beta is {self.beta}; it must lie strictly between 0 and 1: the divergence is 0 at both ends"
                ' (use divergence="forward" or "reverse" for the KLs that β = 0 and 1 mean elsewhere)'
            )

    def exact(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        beta, p, q = self.beta, log_p.exp(), log_q.exp()
        log_m = torch.logaddexp(
            log_p + torch.tensor(beta).double().log(), log_q + torch.tensor(1 - beta).double().log()
        )
        return (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(-1)

    def rows(self, ratios: Ratios, want_gradient: bool) -> tuple[Tensor, Tensor | None]:
        beta, q, d = self.beta, ratios.q, ratios.d
        s = torch.where(
            d < LARGE_LOG_RATIO,
            torch.log1p((1 - beta) * torch.expm1(d.clamp(max=LARGE_LOG_RATIO))),
            d + math.log1p(-beta),
        )
        a = d - s
        mean = (q * a).sum(-1, keepdim=True)
        value = (1 - beta) * mean - beta * (ratios.p * s).sum(-1, keepdim=True)
        return value[:, 0], (1 - beta) * q * (a - mean) if want_gradient else None

    def at_kl(self, kl: float) -> float:
        return kl * (self.beta * (1 - self.beta))
