"""Expand: an epoch is every row under every context, as often as its weight says, in one shuffled order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from kvopt.train.schedules.order import permutation


@dataclass(frozen=True)
class Expand:
    """rows: how many. weights: whole numbers, copies of each row under each context. seed: of the order."""

    rows: int
    weights: tuple[float, ...]
    seed: int

    @cached_property
    def _copies(self) -> tuple[int, ...]:
        return tuple(context for context, weight in enumerate(self.weights) for _ in range(int(weight)))

    @property
    def per_epoch(self) -> int:
        return self.rows * len(self._copies)

    def _item(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.per_epoch)
        copy, row = divmod(permutation(self.per_epoch, self.seed, epoch)[place], self.rows)
        return row, self._copies[copy]

    def row(self, position: int) -> int:
        return self._item(position)[0]

    def context(self, position: int, kept: tuple[int, ...]) -> int:
        return self._item(position)[1]

    def rescores_at(self, step: int) -> bool:
        return False
