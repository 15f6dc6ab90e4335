"""Means over seeds with two intervals each, and whether two arms can be told apart.

``ci95`` asks what other seeds would give on the same rows: mean ± t(0.975, n − 1) s / √n over n seeds, s with divisor
n − 1; with three seeds that is ± 2.48 s.

``ci95_bootstrap`` asks what other rows would give too: the 2.5 % and 97.5 % percentiles of the mean over bootstrap
draws of rows (the same ones for every arm, so that differences are paired) and, independently, of seeds. Of few seeds a
bootstrap makes too little (with three, the standard deviation it sees is too small by a factor 0.82), so read the two
together. With one seed this interval is over rows alone, and of one row there is none.

Whether two arms can be told apart is a paired test over rows and seeds (:func:`paired_p`). Each seed's own difference
is taken on the same rows; the variance of their mean is that between seeds, divided by n, plus that over rows (by the
bootstrap draws, of the mean over seeds), and t has the degrees of freedom of such a sum (Satterthwaite 1946). Equal
arms are told apart in 2 to 6 % of studies of three or five seeds, where 5 % is meant (``tools/simulate_pairs.py
--studies``). That two arms' intervals over seeds do not overlap is no such test: equal arms are told apart in 0 to 29 %
of studies by it, as seeds differ more or less than rows. One seed says nothing of other seeds, and gives no test. Of
several arms, :func:`kvopt.measure.paired.holm` corrects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import t

from kvopt.documents.study_file import ArmDifference, OverSeeds
from kvopt.measure.bootstrap import bounds, drawn_rows
from kvopt.measure.ratios import Bounds


def over_seeds(values: Sequence[float | None]) -> OverSeeds:
    """Mean, interval and standard deviation; these two are None for one seed, all are where a value is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return OverSeeds(mean=None, ci95=None, std=None, seeds=list(values))
    mean = float(np.mean(known))
    if len(known) < 2:
        return OverSeeds(mean=mean, ci95=None, std=None, seeds=[*known])
    std = float(np.std(known, ddof=1))
    half = float(t.ppf(0.975, len(known) - 1)) * std / len(known) ** 0.5
    return OverSeeds(mean=mean, ci95=(mean - half, mean + half), std=std, seeds=[*known])


def over_rows_and_seeds(draws: Sequence[Mapping[str, np.ndarray]], *, seed: int) -> dict[str, Bounds | None]:
    """(low, high) of the mean over seeds for each quantity that all seeds have; None where a draw of rows leaves a seed
    without a value.

    Args:
        draws: for each seed the quantities in every draw of rows, [resamples], the same rows in the same draw.
        seed: of the draws of seeds, which are not those of the rows with the same seed.
    """
    shared = [name for name in draws[0] if all(name in one for one in draws)]
    if not shared:
        return {}
    values = np.stack([[one[name] for name in shared] for one in draws], axis=-1)  # [quantities, resamples, seeds]
    chosen = drawn_rows(len(draws), [seed, 1], values.shape[1])
    low, high = bounds(np.take_along_axis(values, chosen[None], axis=-1).mean(-1))
    known = np.isfinite(values).all((1, 2))
    return {name: (float(low[i]), float(high[i])) if known[i] else None for i, name in enumerate(shared)}


def compared(
    arm: OverSeeds, reference: OverSeeds, draws: Sequence[np.ndarray] | None = None, rows: int = 0
) -> ArmDifference:
    """Two results of :func:`over_seeds` with the same seeds: the paired difference (arm − reference) and the p-value of
    :func:`paired_p`.

    Args:
        draws: of each seed's difference over draws of rows, [resamples] each; None where a draw has no value.
        rows: how many rows there are to draw.
    """
    pairs = zip(arm.seeds, reference.seeds, strict=False)
    difference = over_seeds([None if a is None or b is None else a - b for a, b in pairs])
    if draws is None or difference.mean is None or difference.std is None:
        return ArmDifference(difference=difference)
    spread = float(np.var(np.stack(draws).mean(0))) * rows / max(1, rows - 1)
    return ArmDifference(
        difference=difference, p=paired_p([d for d in difference.seeds if d is not None], spread, rows)
    )


def paired_p(differences: Sequence[float], over_rows: float, rows: int) -> float | None:
    """Two-sided p-value of a mean difference of zero.

    Args:
        differences: each seed's own difference of two arms, on the same rows.
        over_rows: variance of their mean over draws of rows.
        rows: how many rows there are.

    Returns:
        None for one seed or one row.
    """
    seeds = len(differences)
    if seeds < 2 or rows < 2:
        return None
    mean, between = float(np.mean(differences)), float(np.var(differences, ddof=1)) / seeds
    variance = between + over_rows
    if variance <= 0:
        return 1.0 if mean == 0 else 0.0
    freedom = variance**2 / (between**2 / (seeds - 1) + over_rows**2 / (rows - 1))
    return float(2 * t.sf(abs(mean) / variance**0.5, freedom))
