"""Consistency: −log p_t under one wording + w · divergence from the student itself under another wording.

Each row meets a second context of the pool, drawn anew; the student's distributions under it are a constant (no
gradient flows there), as in unsupervised data augmentation (Xie et al. 2020, arXiv 1904.12848). jsd: ½ KL(other ‖ m) +
½ KL(this ‖ m), m their mean. forward: KL(other ‖ this). reverse: KL(this ‖ other).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from kvopt.config.losses import Anchor, Loss

if TYPE_CHECKING:
    from torch import Tensor

    from kvopt.train.gold_tokens import Gold


class Consistency(Loss):
    """Cross-entropy plus weight · divergence between the student under two wordings of a row."""

    kind: Literal["consistency"]
    weight: float = Field(1.0, ge=0, description="of the divergence")
    divergence: Literal["jsd", "forward", "reverse"] = Field(
        "jsd", description="JSD, KL(other wording ‖ this one), or KL(this one ‖ other wording)"
    )
    anchor: ClassVar[Anchor] = "other"

    def __call__(self, gold: Gold) -> Tensor:
        """−log p_t + weight · divergence; ``gold.anchor`` are the states under the other wording."""
        return -gold.log_probs() + self.weight * gold.divergence(self.divergence)
