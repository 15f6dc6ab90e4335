"""Resample: an epoch is every row once, each under a context that is drawn anew for each row and epoch."""

from __future__ import annotations

from dataclasses import dataclass

from kvopt.train.schedules.order import draws, permutation


@dataclass(frozen=True)
class Resample:
    """rows: how many. weights: chances of the contexts, up to a factor. seed: of order and draws."""

    rows: int
    weights: tuple[float, ...]
    seed: int

    @property
    def per_epoch(self) -> int:
        return self.rows

    def row(self, position: int) -> int:
        epoch, place = divmod(position, self.rows)
        return permutation(self.rows, self.seed, epoch)[place]

    def context(self, position: int, kept: tuple[int, ...]) -> int:
        return draws(self.rows, self.weights, self.seed, position // self.rows)[self.row(position)]

    def rescores_at(self, step: int) -> bool:
        return False
