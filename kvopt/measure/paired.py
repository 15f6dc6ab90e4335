"""Whether two contexts can be told apart on rows that both were scored on.

Each row gives one difference, and the null hypothesis is that the two contexts could change places on any row. Then the
sign of each row's difference is a coin toss, and the p-value is how often random signs give a sum as large as the
observed one: exact for any distribution of rows, however few and uneven they are. A bootstrap interval that excludes 0
is not: of 16 rows it tells equal contexts apart in 11 % of cases; and intervals that do not overlap find too little
(``tools/simulate_pairs.py``). Of several comparisons the smallest p-value is small by chance; :func:`holm` corrects for
that (Holm 1979).

Symbols: N rows, R draws.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvopt.measure.bootstrap import bounds, drawn_rows

LEVEL = 0.05
"""Of the test: what :func:`holm` gives must be at most this for two contexts to be told apart."""
FLIPS = 9_999
ENUMERATED = 12
"""Up to so many rows all signs are tried."""


@dataclass(frozen=True)
class PairedDifference:
    """The first context's mean per gold token minus the second's.

    Attributes:
        mean: in nats per gold token.
        ci95: bootstrap interval over rows; None for one row.
        p: two-sided, of the sign test above; None for one row.
    """

    mean: float
    ci95: tuple[float, float] | None
    p: float | None


def paired_difference(
    first: np.ndarray, second: np.ndarray, counts: np.ndarray, *, seed: int = 0, resamples: int = 2000
) -> PairedDifference:
    """Args:
    first, second: sums over the gold tokens of each row, [N].
    counts: gold tokens of each row, [N].
    seed, resamples: of the bootstrap, whose draws are those of single intervals.
    """
    differences, total = first.astype(np.float64) - second, float(counts.sum())
    mean = float(differences.sum() / total)
    if len(differences) < 2:
        return PairedDifference(mean, None, None)
    draws = drawn_rows(len(differences), seed, resamples)
    low, high = bounds(differences[draws].sum(-1) / counts[draws].sum(-1))
    return PairedDifference(mean, (float(low), float(high)), sign_flip_p(differences, seed=seed))


def sign_flip_p(differences: np.ndarray, *, seed: int = 0) -> float:
    """Two-sided p-value of a sum of differences [N] under random signs: all of them for few rows, else FLIPS draws
    (with the observed signs counted as one of them, so that it is never 0).
    """
    observed = abs(differences.sum())
    slack = 1e-12 * np.abs(differences).sum()  # the same numbers in another order
    if len(differences) <= ENUMERATED:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(differences))))
        return float(np.mean(np.abs(signs @ differences) >= observed - slack))
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(FLIPS, len(differences)))
    return float((1 + np.sum(np.abs(signs @ differences) >= observed - slack)) / (FLIPS + 1))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """The p-values corrected for their number, in the same order; None stays None."""
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        corrected[place] = largest
    return corrected


def optimism(sums: np.ndarray, counts: np.ndarray, *, seed: int = 0, resamples: int = 2000) -> float | None:
    """How much lower the lowest mean of K contexts looks than it is, where it is picked by the rows that it is read
    from: the mean over bootstrap draws of what the context that a draw picks has on all rows, minus what it has in the
    draw.

    Args:
        sums: [K, N] sums over the gold tokens of each row. counts: [N] gold tokens of each row.

    None for one row or one context.
    """
    if sums.shape[0] < 2 or sums.shape[1] < 2:
        return None
    draws = drawn_rows(sums.shape[1], seed, resamples)
    drawn = sums[:, draws].sum(-1) / counts[draws].sum(-1)
    picked = drawn.argmin(0)
    whole = sums.sum(-1) / counts.sum()
    return max(0.0, float((whole[picked] - drawn[picked, np.arange(len(draws))]).mean()))
