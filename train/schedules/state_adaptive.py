"""State-adaptive (SAPO): the pool is scored under the current student by gold NLL, the loss before the update, and
rows meet only the lowest ``keep`` contexts until the next scoring.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from kvopt.config.schedules import Schedule

if TYPE_CHECKING:
    from kvopt.train.stream import Stream


class AdaptiveSchedule(Schedule):
    """Every row once an epoch, under one of the contexts with the lowest gold NLL under the current student (SAPO)."""

    kind: Literal["state-adaptive"]
    every: int | None = Field(None, ge=1, description="steps between scorings of the pool; default: once, at the start")
    keep: int = Field(1, ge=1, description="contexts that are kept until the next scoring")
    rows: int = Field(64, ge=1, description="training rows that the pool is scored on, from the first on")
    adapts: ClassVar[bool] = True

    def context(self, stream: Stream, position: int, kept: tuple[int, ...]) -> int:
        """One of those kept, drawn anew for each row and epoch."""
        return stream.drawn_context(position, kept)

    @property
    def scored_rows(self) -> int:
        """``rows``."""
        return self.rows

    def rescores_at(self, step: int) -> bool:
        """Every so many steps, or once, before the first."""
        return step == 0 if self.every is None else step % self.every == 0

    def choose(self, nll: Sequence[float]) -> tuple[int, ...]:
        """The ``keep`` contexts with the lowest gold NLL; ties go to the first."""
        lowest = sorted(range(len(nll)), key=lambda context: (nll[context], context))[: self.keep]
        return tuple(sorted(lowest))
