"""How far one number explains another over a sweep: ordinary least squares (scipy.stats.linregress)."""

from __future__ import annotations

from collections.abc import Sequence

from scipy.stats import linregress

from kvopt.documents.study_file import ExplainedVariance

LEAST_POINTS = 3


def explained(x: Sequence[float | None], y: Sequence[float | None]) -> ExplainedVariance | None:
    """What x explains of y, over the points that have both; None for fewer than
    three, or where x does not vary.
    """
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if a is not None and b is not None]
    if len(pairs) < LEAST_POINTS or len({a for a, _ in pairs}) < 2:
        return None
    found = linregress(*zip(*pairs, strict=True))
    return ExplainedVariance(
        points=len(pairs),
        slope=float(found.slope),
        intercept=float(found.intercept),
        r2=float(found.rvalue) ** 2,
        p=float(found.pvalue),
    )
