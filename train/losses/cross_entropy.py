"""Cross-entropy: −log p_t, the loss of plain supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from kvopt.train.losses.gold import Gold, gold_log_probs


@dataclass(frozen=True)
class CrossEntropy:
    """−log p_t."""

    anchor: Literal["none"] = "none"

    def __call__(self, gold: Gold) -> Tensor:
        return -gold_log_probs(gold)
