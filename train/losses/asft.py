"""Anchored SFT (arXiv 2509.23753): DFT + λ KL to the base, λ 0.05 to 0.1.

The paper's text says reverse KL(pθ ‖ p0), its code computes forward KL(p0 ‖ pθ): the direction is an option. In the
paper the base sees what the student sees (``anchor="same"``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kvopt.train.losses.dft import dynamic
from kvopt.train.losses.gold import Gold, anchor_kl, gold_log_probs


@dataclass(frozen=True)
class ASFT:
    """−sg(p_t) log p_t + weight · KL in the given direction ("forward": KL(base ‖ student))."""

    weight: float = 0.05
    direction: str = "forward"
    anchor: Literal["original", "same"] = "same"

    def __call__(self, gold: Gold) -> Tensor:
        return dynamic(gold_log_probs(gold)) + self.weight * anchor_kl(gold, self.direction)
