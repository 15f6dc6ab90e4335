"""What mutations, and checkpoints of learned contexts, are ordered by: the quantity of ``score.select``."""

from __future__ import annotations

import math
from collections.abc import Callable

from kvopt.base.prefix import Prefix
from kvopt.contexts.context import TextContext
from kvopt.measure.score import Score, TokenScores
from kvopt.run.answers import TaskMetrics


def place(select: str, metrics: Callable[[], TaskMetrics], context: TextContext, score: Score) -> tuple[float, float]:
    """Where a mutation stands by its score on the selection rows: the quantity ``select``, lowest first (a metric with
    its sign turned), and the KL.
    """
    kl = score.kl_forward.mean
    if select in ("kl", "gold_nll"):
        return (kl if select == "kl" else score.gold_nll.mean), kl
    value = metrics().headline(metrics().answers(context, "selection"), select)
    return math.inf if value is None else -value, kl


def checkpoint_chooser(
    select: str, metrics: Callable[[], TaskMetrics]
) -> Callable[[Prefix, TokenScores], float] | None:
    """As :func:`place`, for checkpoints; None for the KL."""
    if select == "kl":
        return None
    if select == "gold_nll":
        return lambda prefix, scores: float(scores.nll.double().mean())
    return lambda prefix, scores: -metrics().value_after(prefix, select)
