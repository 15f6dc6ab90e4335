"""Forward KL(p‖q) = Σ p (log p − log q), the default; its gradient by z_s is q − p = p · expm1(d)."""

from __future__ import annotations

import torch
from torch import Tensor

from kvopt.kernels.divergences.registry import Divergence, Ratios


class Forward(Divergence):
    """Forward KL; c − Σ p v as rows have it."""

    title = "forward KL"
    in_place = True
    stored_forms = ("moments", "top-k")
    store_free = True

    def exact(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    def rows(self, ratios: Ratios, want_gradient: bool) -> tuple[Tensor, Tensor | None]:
        value = (ratios.c - (ratios.p * ratios.v).sum(-1, keepdim=True))[:, 0]
        return value, ratios.moved_mass() if want_gradient else None

    def rows_in_place(
        self, p: Tensor, v: Tensor, scratch: Tensor, want_gradient: bool
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """By expm1(v − c) = (expm1(v) − expm1(c)) e^−c, and expm1(c) = Σ p expm1(v)."""
        residual = torch.mul(p, v, out=scratch).sum(-1)
        moved = torch.mul(p, v.expm1_(), out=scratch)
        mass = moved.sum(-1)
        c = torch.log1p(mass)
        if not want_gradient:
            return c - residual, None, c, None
        return c - residual, moved.addcmul_(p, -mass[:, None]), c, 1 / (1 + mass)

    def of_moments(self, log_partition: Tensor, mean_logit: Tensor, entropy: Tensor) -> Tensor:
        return log_partition - (mean_logit + entropy)

    def of_top_k(self, log_q: Tensor, ids: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """Its gradient is q − p on the k tokens and q (1 − p_tail / q_tail) on the others."""
        tiny = torch.finfo(torch.float32).tiny
        p = log_p.exp()
        chosen = log_q.gather(1, ids)
        tail_p = (1 - p.sum(-1, keepdim=True)).clamp(min=tiny)
        q = log_q.exp()
        tail_q = q.scatter(1, ids, 0.0).sum(-1, keepdim=True).clamp(min=tiny)
        value = (p * (log_p - chosen)).sum(-1) + (tail_p * (tail_p.log() - tail_q.log()))[:, 0]
        return value, (q * (1 - tail_p / tail_q)).scatter(1, ids, chosen.exp() - p)
