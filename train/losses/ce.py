"""Cross-entropy: −log p_t, the loss of plain supervised fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from kvopt.config.losses import Anchor, Loss

if TYPE_CHECKING:
    from torch import Tensor

    from kvopt.train.gold_tokens import Gold


class CrossEntropy(Loss):
    """Mean of −log p(gold)."""

    kind: Literal["ce"] = "ce"
    anchor: ClassVar[Anchor] = "none"

    def __call__(self, gold: Gold) -> Tensor:
        """−log p_t."""
        return -gold.log_probs()
