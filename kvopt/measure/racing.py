"""Successive halving: the best few of many contexts, for a share of the work of scoring all of them on all rows.

All contestants are scored on the same first rows, and the worse half is dropped; those that are left are scored on as
many more rows as they have behind them, and so on, until few enough are left to be scored on every row (Karnin et al.
2013; Jamieson and Talwalkar 2016, arXiv 1502.07943). Every comparison is of means over the same rows, so what makes a
row easy or hard for all of them cancels out.

A *row evaluation* is one row under one context. Symbols: N contestants, K kept, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Heat:
    """One round of a race.

    Attributes:
        contestants: how many are scored.
        first, last: they are scored on the rows from ``first`` up to ``last`` (not included), in the race's order, and
            compared on all up to ``last``.
        left: how many stay in the race.
    """

    contestants: int
    first: int
    last: int
    left: int

    @property
    def evaluations(self) -> int:
        """Row evaluations of this round."""
        return self.contestants * (self.last - self.first)


def heats(contestants: int, keep: int, rows: int, share: float) -> tuple[Heat, ...]:
    """The rounds of a race that takes, with ``keep`` contexts scored on all rows at its end, at most ``share`` of the
    row evaluations of scoring all; of all such races the one that begins with most rows. Empty where there is none, or
    nobody to drop.
    """
    if contestants <= keep:
        return ()
    for begin in range(rows - 1, 0, -1):
        found = _beginning_with(begin, contestants, keep, rows)
        if evaluations(found, keep, rows) <= share * contestants * rows:
            return found
    return ()


def _beginning_with(begin: int, contestants: int, keep: int, rows: int) -> tuple[Heat, ...]:
    found: list[Heat] = []
    first, last = 0, begin
    while contestants > keep:
        left = keep if last == rows else max(keep, (contestants + 1) // 2)
        found.append(Heat(contestants, first, last, left))
        contestants, first, last = left, last, min(rows, 2 * last)
    return tuple(found)


def evaluations(race: Sequence[Heat], keep: int, rows: int) -> int:
    """Row evaluations of a race and of scoring the ``keep`` that it leaves on all rows, anew."""
    return sum(heat.evaluations for heat in race) + keep * rows


def row_order(rows: int, seed: int) -> list[int]:
    """The order in which a race takes rows."""
    return [int(row) for row in np.random.default_rng(seed).permutation(rows)]
