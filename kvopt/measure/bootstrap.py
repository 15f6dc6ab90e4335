"""The bootstrap behind every interval: rows drawn with replacement, and percentiles of what the draws give.

Draws depend on the number of rows and the seed alone, so values of two models in the same draw can be subtracted. They
are the draws, and the percentiles are the percentiles, of ``scipy.stats.bootstrap(…, method="percentile")``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import quantile

LEVEL = 0.95


def drawn_rows(rows: int, seed: int | Sequence[int], resamples: int) -> np.ndarray:
    """The rows of each draw by their positions, [resamples, rows] int64."""
    return np.random.default_rng(seed).integers(rows, size=(resamples, rows))


def row_draws(rows: int, seed: int, resamples: int) -> np.ndarray:
    """How often each draw has each row, [resamples, rows] float64."""
    starts = np.arange(resamples)[:, None] * rows
    counts = np.bincount((drawn_rows(rows, seed, resamples) + starts).ravel(), minlength=resamples * rows)
    return counts.reshape(resamples, rows).astype(np.float64)


def bounds(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 2.5 % and 97.5 % percentiles [...] of what a statistic is in each draw, [..., resamples]; NaN where it is NaN
    in a draw.
    """
    tail = (1 - LEVEL) / 2
    low, high = np.moveaxis(quantile(draws, np.array([tail, 1 - tail]), axis=-1), -1, 0)
    return low, high
