"""State-adaptive (SAPO): the pool is scored under the current student by gold NLL, the loss before the update, and
rows meet only the lowest ``keep`` contexts until the next scoring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvopt.train.schedules.order import draws
from kvopt.train.schedules.resample import Resample


@dataclass(frozen=True)
class StateAdaptive(Resample):
    """every: steps between scorings (None: once, before the first step). keep: contexts kept. ``scored_rows``: training
    rows that the pool is scored on, from the first on.
    """

    every: int | None = None
    keep: int = 1
    scored_rows: int = field(default=64)

    def context(self, position: int, kept: tuple[int, ...]) -> int:
        weights = tuple(self.weights[context] for context in kept)
        return kept[draws(self.rows, weights, self.seed, position // self.rows)[self.row(position)]]

    def rescores_at(self, step: int) -> bool:
        return step == 0 if self.every is None else step % self.every == 0

    def choose(self, nll: Sequence[float]) -> tuple[int, ...]:
        """The ``keep`` contexts with the lowest gold NLL, in the pool's order; ties go to the first."""
        lowest = sorted(range(len(nll)), key=lambda context: (nll[context], context))[: self.keep]
        return tuple(sorted(lowest))
