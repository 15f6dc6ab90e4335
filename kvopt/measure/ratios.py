"""Means over examples, statistics over contexts, and bootstrap intervals of both.

Every quantity is a ratio of sums over examples: under context c, Σ_i numerator[c, i] / Σ_i denominator[c, i]. A group
of contexts has the mean, lowest and highest, standard deviation (over the contexts at hand, divisor n) and spread
(highest − lowest) of these values. Intervals are 95 % percentile bootstraps over examples: one draw takes the same
examples under every context, so that a group's interval is that of a paired comparison.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kvopt.config.metrics import Ratio
from kvopt.documents.evaluation_file import GroupEstimate
from kvopt.documents.part import Estimate
from kvopt.measure.bootstrap import bounds, row_draws

Ratios = Mapping[str, Sequence[Mapping[str, Ratio]]]
"""Context name → the ratios by quantity of each example, the same examples in the same order everywhere."""

NEAR = 0.05
"""How far below the best wording another one still counts as good."""

Bounds = tuple[float, float]
"""Lower and upper end of an interval."""


def summarize(
    ratios: Ratios, groups: Mapping[str, Sequence[str]], *, seed: int, resamples: int
) -> tuple[dict[str, dict[str, Estimate]], dict[str, dict[str, GroupEstimate]]]:
    """(quantities by context, quantities by group). Values that do not exist (0 / 0, or an interval of one example)
    are None.
    """
    names, quantities, pairs = _arranged(ratios)
    members = {group: [names.index(name) for name in chosen] for group, chosen in groups.items()}

    low, high = _intervals(pairs, list(members.values()), seed, resamples)
    values = _quotients(np.moveaxis(pairs.sum(2), -1, 0))  # [contexts, quantities]
    by_context = {
        name: {
            q: Estimate(mean=_number(values[c, i]), ci95=_pair(low[c, i], high[c, i])) for i, q in enumerate(quantities)
        }
        for c, name in enumerate(names)
    }
    by_group = {}
    for g, (group, chosen) in enumerate(members.items()):
        mean_row, spread_row = len(names) + g, len(names) + len(members) + g
        by_group[group] = {
            q: _of_group(
                values[chosen, i],
                _pair(low[mean_row, i], high[mean_row, i]),
                _pair(low[spread_row, i], high[spread_row, i]),
            )
            for i, q in enumerate(quantities)
        }
    return by_context, by_group


def ratio_of(rows: Sequence[Ratio], *, seed: int, resamples: int) -> Estimate:
    """Mean and interval of one quantity."""
    by_context, _ = summarize({"": [{"": row} for row in rows]}, {}, seed=seed, resamples=resamples)
    return by_context[""][""]


def retention(
    ratios: Ratios, groups: Mapping[str, Sequence[str]], to: str, *, seed: int, resamples: int
) -> tuple[dict[str, dict[str, Estimate]], dict[str, dict[str, Estimate]]]:
    """(by context, by group) and quantity: the value, or the mean over the group's contexts, divided by the value under
    the context ``to``; None where that is 0. A draw of the interval takes the same examples for both.
    """
    names, quantities, pairs = _arranged(ratios)
    values = _quotients(np.moveaxis(pairs.sum(2), -1, 0))[..., None]  # [contexts, quantities, 1]
    examples, base = pairs.shape[2], names.index(to)
    drawn = _drawn_values(pairs, row_draws(examples, seed, resamples)) if examples > 1 else None

    def of(chosen: Sequence[str]) -> dict[str, Estimate]:
        places = [names.index(name) for name in chosen]
        means = _quotients(np.stack([values[places].mean(0), values[base]]))[:, 0]
        low, high = np.full((2, len(quantities)), np.nan)
        if drawn is not None:
            low, high = bounds(_quotients(np.stack([drawn[places].mean(0), drawn[base]])))
        return {q: Estimate(mean=_number(means[i]), ci95=_pair(low[i], high[i])) for i, q in enumerate(quantities)}

    return {name: of([name]) for name in names}, {group: of(chosen) for group, chosen in groups.items()}


def near_best(values: Sequence[float | None]) -> float | None:
    """Share of the values that lie at most :data:`NEAR` below the highest; None where one does not exist."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return sum(value >= max(known) - NEAR - 1e-12 for value in known) / len(known)


def redrawn(
    ratios: Ratios, groups: Mapping[str, Sequence[str]], draws: np.ndarray
) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Group → quantity → (mean over the group's contexts, spread over them), each [draws]; NaN where a draw has none.

    Args:
        draws: from :func:`kvopt.measure.bootstrap.row_draws`.
    """
    names, quantities, pairs = _arranged(ratios)
    values = _drawn_values(pairs, draws)
    groups_summary = {}
    for group, chosen in groups.items():
        means, spreads = _mean_and_spread(values[[names.index(name) for name in chosen]])
        groups_summary[group] = {q: (means[i], spreads[i]) for i, q in enumerate(quantities)}
    return groups_summary


def _arranged(ratios: Ratios) -> tuple[list[str], list[str], np.ndarray]:
    """(contexts, quantities, ratios [contexts, quantities, examples, 2])."""
    names = list(ratios)
    quantities = list(dict.fromkeys(q for name in names for row in ratios[name] for q in row))
    pairs = [[[row.get(q, (0.0, 0.0)) for row in ratios[name]] for q in quantities] for name in names]
    return names, quantities, np.array(pairs, dtype=np.float64)


def _drawn_values(pairs: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Quotients of sums [contexts, quantities, draws] for counts [draws, examples] of how often each was drawn."""
    return _quotients(np.einsum("cqik,ri->kcqr", pairs, counts))


def _quotients(sums: np.ndarray) -> np.ndarray:
    """[...] for numerators and denominators [2, ...]; NaN over 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(sums[1] == 0, np.nan, sums[0] / sums[1])


def _mean_and_spread(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Over the contexts, the first axis."""
    return values.mean(0), values.max(0) - values.min(0)


def _intervals(
    pairs: np.ndarray, members: Sequence[Sequence[int]], seed: int, resamples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bounds [contexts + 2 · groups, quantities]: of each context, of each group's mean, and of each
    group's spread; NaN where there are none.
    """
    contexts, quantities, examples, _ = pairs.shape
    if examples < 2:
        nothing = np.full((contexts + 2 * len(members), quantities), np.nan)
        return nothing, nothing
    values = _drawn_values(pairs, row_draws(examples, seed, resamples))
    over = [_mean_and_spread(values[chosen]) for chosen in members]
    return bounds(np.stack([*values, *(mean for mean, _ in over), *(spread for _, spread in over)]))


def _of_group(values: np.ndarray, ci95: Bounds | None, of_spread: Bounds | None) -> GroupEstimate:
    if np.isnan(values).any() or not len(values):
        return GroupEstimate(mean=None, min=None, max=None, std=None, spread=None, ci95=ci95, spread_ci95=of_spread)
    return GroupEstimate(
        mean=float(values.mean()),
        min=float(values.min()),
        max=float(values.max()),
        std=float(values.std()),
        spread=float(values.max() - values.min()),
        ci95=ci95,
        spread_ci95=of_spread,
    )


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _pair(low: float, high: float) -> Bounds | None:
    return None if np.isnan(low) or np.isnan(high) else (float(low), float(high))
