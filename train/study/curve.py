"""Fits over a study's arms: how far one number explains another, and what the n-th mutation buys, a power law in the
number of wordings with a bootstrap over seeds.

y(n) = a · m^(−b) + c with m = n + 1 wordings (the original and n mutations), because a power of n itself does not exist
at n = 0; a + c is the value without mutations and c the one that ever more of them approach. Least squares
(scipy.optimize.curve_fit) on the points of all seeds; b is kept in (0, 8).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import OptimizeWarning, curve_fit
from scipy.stats import f as f_distribution
from scipy.stats import linregress

from kvopt.documents.study_file import CurveFit, ExplainedVariance, PowerLaw, PowerLawIntervals
from kvopt.measure.bootstrap import bounds, drawn_rows

HIGHEST_B = 8.0
MOST_EVALUATIONS = 300
LEAST_POINTS = 3
LEAST_COUNTS = 3
"""Numbers of mutations that three parameters need at least."""
LEAST_SHARE = 0.5
"""An interval is given when at least this share of the bootstrap fits converged."""


def power_law(wordings: np.ndarray, a: float, b: float, c: float) -> np.ndarray:
    """a · m^(−b) + c."""
    return a * wordings**-b + c


def fit_curve(points: Mapping[int, Sequence[float]], *, seed: int = 0, resamples: int = 400) -> CurveFit:
    """Fit the values of each seed by number of mutations.

    Args:
        points: n → one value for each seed, the same seeds in the same order everywhere.

    Returns:
        ``fit`` is None ("no fit") when least squares do not converge or leave a, b or c undetermined,
        ``p`` is that of an F test of the fit against a flat curve, both with an offset for every seed (approximate, as
        b is not linear), and ``converged`` the share of bootstrap draws (of seeds, with replacement) whose fit did.
    """
    counts = sorted(points)
    values = np.array([points[n] for n in counts], dtype=np.float64)  # [counts, seeds]
    wordings = np.array(counts, dtype=np.float64) + 1
    fit = _fit(wordings, values)
    seeds = values.shape[1]
    drawn = np.sort(drawn_rows(seeds, seed, resamples), axis=1)
    fits = {tuple(draw): _fit(wordings, values[:, draw]) for draw in np.unique(drawn, axis=0)} if seeds > 1 else {}
    draws = [fits[tuple(draw)] for draw in drawn] if fits else []
    good = [draw for draw in draws if draw is not None]
    share = len(good) / len(draws) if draws else None
    interval = None
    if fit is not None and share is not None and share >= LEAST_SHARE:
        low, high = bounds(np.array(good).T)
        a, b, c = ((float(lower), float(upper)) for lower, upper in zip(low, high, strict=True))
        interval = PowerLawIntervals(a=a, b=b, c=c)
    return CurveFit(
        counts=counts,
        values={n: list(map(float, points[n])) for n in counts},
        fit=PowerLaw(a=float(fit[0]), b=float(fit[1]), c=float(fit[2])) if fit is not None else None,
        ci95=interval,
        r2=_r2(wordings, values, fit) if fit is not None else None,
        p=_against_flat(wordings, values, fit) if fit is not None else None,
        converged=share,
    )


def _fit(wordings: np.ndarray, values: np.ndarray) -> np.ndarray | None:
    """(a, b, c), or None when there is no fit."""
    x, y = np.repeat(wordings, values.shape[1]), values.ravel()
    means = values.mean(1)
    if len(wordings) < LEAST_COUNTS or np.ptp(values) == 0:  # a flat line is every power law with a = 0
        return None
    start = (means[0] - means[-1], 1.0, means[-1])
    bounds = ([-np.inf, 1e-6, -np.inf], [np.inf, HIGHEST_B, np.inf])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", OptimizeWarning)
            parameters, covariance = curve_fit(power_law, x, y, p0=start, bounds=bounds, max_nfev=MOST_EVALUATIONS)
    except (RuntimeError, ValueError, OptimizeWarning):
        return None
    determined = np.isfinite(covariance).all() and 1e-3 < parameters[1] < HIGHEST_B - 1e-3
    return parameters if determined else None


def _r2(wordings: np.ndarray, values: np.ndarray, fit: np.ndarray) -> float | None:
    residuals = values - power_law(wordings, *fit)[:, None]
    total = ((values - values.mean()) ** 2).sum()
    return float(1 - (residuals**2).sum() / total) if total > 0 else None


def _against_flat(wordings: np.ndarray, values: np.ndarray, fit: np.ndarray) -> float | None:
    """p of the F test of the power law (a and b: two parameters more) against no change with the wordings."""
    counts, seeds = values.shape
    free = counts * seeds - seeds - 2
    if free < 1:
        return None
    flat = values - values.mean(0)
    law = power_law(wordings, *fit)
    left = ((flat - (law - law.mean())[:, None]) ** 2).sum()
    gained = max(0.0, float((flat**2).sum() - left)) / 2
    return float(f_distribution.sf(gained / (left / free), 2, free)) if left > 0 else 0.0


def explained(x: Sequence[float | None], y: Sequence[float | None]) -> ExplainedVariance | None:
    """What x explains of y, over the points that have both; None for fewer than
    three, or where x does not vary.
    """
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if a is not None and b is not None]
    if len(pairs) < LEAST_POINTS or len({a for a, _ in pairs}) < 2:
        return None
    line = linregress(*zip(*pairs, strict=True))
    return ExplainedVariance(
        points=len(pairs),
        slope=float(line.slope),
        intercept=float(line.intercept),
        r2=float(line.rvalue) ** 2,
        p=float(line.pvalue),
    )
