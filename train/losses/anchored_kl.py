"""Context-anchored KL: −log p_t + λ KL(p0(· | V, C) ‖ pθ(· | V, C')).

With ``anchor: original`` the base sees the original template C while the student sees C', so the student is drawn to
answer under every wording as the base answers under the one that was written with care.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from kvopt.config.losses import Loss

if TYPE_CHECKING:
    from torch import Tensor

    from kvopt.train.gold_tokens import Gold


class AnchoredKL(Loss):
    """Cross-entropy plus weight · KL between the base and the student."""

    kind: Literal["anchored-kl"]
    weight: float = Field(0.1, ge=0, description="of the KL term (λ)")
    direction: Literal["forward", "reverse"] = Field("forward", description="KL(base ‖ student) or KL(student ‖ base)")
    anchor: Literal["original", "same"] = Field(
        "original", description="what the base sees: the original template, or the context that the student sees"
    )

    def __call__(self, gold: Gold) -> Tensor:
        """−log p_t + weight · KL in the given direction."""
        return -gold.log_probs() + self.weight * gold.divergence(self.direction)
