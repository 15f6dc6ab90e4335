"""Dynamic fine-tuning (Wu et al. 2025, arXiv 2508.05629): −sg(p_t) log p_t.

The stop-gradient weight p_t takes back the 1/p_t of cross-entropy's gradient, so unlikely tokens no longer dominate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kvopt.train.losses.gold import Gold, gold_log_probs


def dynamic(log_probs: Tensor) -> Tensor:
    """−sg(p) log p of log p [G]."""
    return -log_probs.detach().exp() * log_probs


@dataclass(frozen=True)
class DFT:
    """−sg(p_t) log p_t."""

    anchor: Literal["none"] = "none"

    def __call__(self, gold: Gold) -> Tensor:
        return dynamic(gold_log_probs(gold))
