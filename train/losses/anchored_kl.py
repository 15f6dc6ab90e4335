"""Context-anchored KL: −log p_t + λ KL(p0(· | V, C) ‖ pθ(· | V, C')).

With ``anchor="original"`` the base sees the original template C while the student sees C', so the student is drawn to
answer under every wording as the base answers under the one that was written with care.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kvopt.train.losses.gold import Gold, anchor_kl, gold_log_probs


@dataclass(frozen=True)
class AnchoredKL:
    """−log p_t + weight · KL in the given direction ("forward": KL(base ‖ student))."""

    weight: float = 0.1
    direction: str = "forward"
    anchor: Literal["original", "same"] = "original"

    def __call__(self, gold: Gold) -> Tensor:
        return -gold_log_probs(gold) + self.weight * anchor_kl(gold, self.direction)
