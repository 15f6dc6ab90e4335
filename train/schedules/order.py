"""Seeded orders and draws, and what every schedule answers."""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import torch

from kvopt.storage.files import sha256_bytes


class Schedule(Protocol):
    """Which row meets which context. ``kept`` are the contexts chosen last, positions in the pool; only state-adaptive
    schedules look at it.
    """

    @property
    def per_epoch(self) -> int:
        """Items an epoch."""
        ...

    def row(self, position: int) -> int:
        """The row at a position of the stream; it never depends on the student."""
        ...

    def context(self, position: int, kept: tuple[int, ...]) -> int:
        """The context that it meets."""
        ...

    def rescores_at(self, step: int) -> bool:
        """Whether the pool is scored before this step (from 0)."""
        ...


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
