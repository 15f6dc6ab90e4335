"""Dynamic fine-tuning (Wu et al. 2025, arXiv 2508.05629): −sg(p_t) log p_t.

The stop-gradient weight p_t takes back the 1/p_t of cross-entropy's gradient, so unlikely tokens no longer dominate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from kvopt.config.losses import Anchor, Loss

if TYPE_CHECKING:
    from torch import Tensor

    from kvopt.train.gold_tokens import Gold


def dynamic(log_probs: Tensor) -> Tensor:
    """−sg(p) log p of log p [G]."""
    return -log_probs.detach().exp() * log_probs


class DFT(Loss):
    """Dynamic fine-tuning: −sg(p) log p."""

    kind: Literal["dft"]
    anchor: ClassVar[Anchor] = "none"

    def __call__(self, gold: Gold) -> Tensor:
        """−sg(p_t) log p_t."""
        return dynamic(gold.log_probs())
