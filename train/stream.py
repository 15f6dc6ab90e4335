"""The training stream: which row meets which context at every position, with seeded orders and draws.

Positions count items from the start of training, step after step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from kvopt.config.schedules import Schedule
from kvopt.storage.files import sha256_bytes


@dataclass(frozen=True)
class Stream:
    """Rows and contexts under a schedule.

    Attributes:
        schedule: what decides.
        rows: how many.
        weights: of the contexts.
        seed: of orders and draws.
        batch_size: items in a step.
    """

    schedule: Schedule
    rows: int
    weights: tuple[float, ...]
    seed: int
    batch_size: int = 1

    @property
    def per_epoch(self) -> int:
        """Items an epoch."""
        return self.schedule.per_epoch(self)

    def row(self, position: int) -> int:
        """The row at a position."""
        return self.schedule.row(self, position)

    def context(self, position: int, kept: tuple[int, ...]) -> int:
        """The context that it meets; ``kept`` are those that a schedule which adapts chose last."""
        return self.schedule.context(self, position, kept)

    # ---- what schedules are built from

    def order(self, count: int, epoch: int) -> tuple[int, ...]:
        """The numbers under ``count`` in an order that belongs to the epoch."""
        return permutation(count, self.seed, epoch)

    def shuffled_row(self, position: int) -> int:
        """The row at a position where an epoch is every row once."""
        epoch, place = divmod(position, self.rows)
        return self.order(self.rows, epoch)[place]

    def drawn_context(self, position: int, among: Sequence[int]) -> int:
        """One of these contexts, drawn by weight for the position's row and epoch, where an epoch is every row once."""
        weights = tuple(self.weights[context] for context in among)
        drawn = draws(self.rows, weights, self.seed, position // self.rows)
        return among[drawn[self.shuffled_row(position)]]

    def context_of_steps(self, position: int, every: int) -> int:
        """One context, drawn by weight, for all items of ``every`` steps."""
        return draws(1, self.weights, self.seed, -1 - position // self.batch_size // every)[0]


def generator(*key: object) -> torch.Generator:
    """A stream of random numbers that belongs to ``key``."""
    digest = sha256_bytes("/".join(map(str, key)).encode())
    return torch.Generator().manual_seed(int(digest[:15], 16))


@lru_cache(maxsize=4)
def permutation(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The order of an epoch's items."""
    return tuple(torch.randperm(count, generator=generator("order", seed, epoch)).tolist())


@lru_cache(maxsize=16)
def draws(rows: int, weights: tuple[float, ...], seed: int, epoch: int) -> tuple[int, ...]:
    """For each row a position in ``weights``, drawn in proportion to them."""
    drawn = torch.multinomial(
        torch.tensor(weights, dtype=torch.float64), rows, True, generator=generator("context", seed, epoch)
    )
    return tuple(drawn.tolist())
