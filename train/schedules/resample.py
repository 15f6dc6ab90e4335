"""Resample: an epoch is every row once, each under a context that is drawn anew for each row and epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from kvopt.config.schedules import Schedule

if TYPE_CHECKING:
    from kvopt.train.stream import Stream


class Resample(Schedule):
    """Every row once an epoch, its context drawn anew each time, in proportion to the weights."""

    kind: Literal["resample"] = "resample"

    def context(self, stream: Stream, position: int, kept: tuple[int, ...]) -> int:
        """One of all."""
        return stream.drawn_context(position, range(len(stream.weights)))
