"""Reverse KL(q‖p) = L = Σ q (log q − log p) = Σ q d; its gradient by z_s is q (d − L)."""

from __future__ import annotations

from torch import Tensor

from kvopt.kernels.divergences.registry import Divergence, Ratios


class Reverse(Divergence):
    """Reverse KL: what a candidate loses by answers that the reference would not give."""

    title = "reverse KL"

    def exact(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_q.exp() * (log_q - log_p)).sum(-1)

    def rows(self, ratios: Ratios, want_gradient: bool) -> tuple[Tensor, Tensor | None]:
        q, d = ratios.q, ratios.d
        mean = (q * d).sum(-1, keepdim=True)
        return mean[:, 0], q * (d - mean) if want_gradient else None
