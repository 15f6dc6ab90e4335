"""Anchored SFT (arXiv 2509.23753): DFT + λ KL to the base, λ 0.05 to 0.1.

The paper's text says reverse KL(pθ ‖ p0), its code computes forward KL(p0 ‖ pθ): the direction is an option. In the
paper the base sees what the student sees (``anchor: same``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from kvopt.config.losses import Loss
from kvopt.train.losses.dft import dynamic

if TYPE_CHECKING:
    from torch import Tensor

    from kvopt.train.gold_tokens import Gold


class ASFT(Loss):
    """Anchored SFT: DFT plus weight · KL between the base and the student."""

    kind: Literal["asft"]
    weight: float = Field(0.05, ge=0, description="of the KL term (λ)")
    direction: Literal["forward", "reverse"] = Field(
        "forward", description="KL(base ‖ student), as in the paper's code, or KL(student ‖ base), as in its text"
    )
    anchor: Literal["original", "same"] = Field(
        "same", description="what the base sees: the context that the student sees, or the original template"
    )

    def __call__(self, gold: Gold) -> Tensor:
        """−sg(p_t) log p_t + weight · KL in the given direction."""
        return dynamic(gold.log_probs()) + self.weight * gold.divergence(self.direction)
