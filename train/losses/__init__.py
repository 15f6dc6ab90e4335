"""Losses of students on gold tokens: each file is one, a callable from :class:`Gold` to nats per gold token [G]."""

from __future__ import annotations

from typing import Any

from kvopt.config.students import CrossEntropyConfig
from kvopt.train.losses.anchored_kl import AnchoredKL
from kvopt.train.losses.asft import ASFT
from kvopt.train.losses.cross_entropy import CrossEntropy
from kvopt.train.losses.dft import DFT
from kvopt.train.losses.gold import Gold, Loss
from kvopt.train.losses.on_policy import OnPolicyDivergence

__all__ = ["ASFT", "DFT", "AnchoredKL", "CrossEntropy", "Gold", "Loss", "OnPolicyDivergence", "build_loss"]

LOSSES: dict[str, Any] = {
    "ce": CrossEntropy,
    "anchored-kl": AnchoredKL,
    "dft": DFT,
    "asft": ASFT,
    "on-policy": OnPolicyDivergence,
}


def build_loss(config: Any = None) -> Loss:
    """The loss of a ``loss:`` section (default: cross-entropy)."""
    config = config or CrossEntropyConfig()
    return LOSSES[config.kind](**config.model_dump(exclude={"kind"}))
