"""Means over seeds with two intervals each, and whether two arms can be told apart.

``ci95`` asks what other seeds would give on the same rows: mean ± t(0.975, n − 1) s / √n over n seeds, s with divisor
n − 1; with three seeds that is ± 2.48 s. Two arms are separable when these intervals do not overlap. The paired
difference takes each seed's own difference, which is the sharper comparison where seeds share their order of rows.

``ci95_bootstrap`` asks what other rows would give too: the 2.5 % and 97.5 % percentiles of the mean over bootstrap
draws of rows (the same ones for every arm, so that differences are paired) and, independently, of seeds. Of few seeds a
bootstrap makes too little (with three, the standard deviation it sees is too small by a factor 0.82), so read the two
together. With one seed this interval is over rows alone, and of one row there is none.
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


def compared(arm: OverSeeds, reference: OverSeeds) -> ArmDifference:
    """Two results of :func:`over_seeds` with the same seeds: the paired difference (arm − reference), and whether the
    intervals lie apart (None for one seed).
    """
    pairs = zip(arm.seeds, reference.seeds, strict=False)
    differences = [None if a is None or b is None else a - b for a, b in pairs]
    separable = None
    if arm.ci95 and reference.ci95:
        separable = arm.ci95[0] > reference.ci95[1] or reference.ci95[0] > arm.ci95[1]
    return ArmDifference(difference=over_seeds(differences), separable=separable)
