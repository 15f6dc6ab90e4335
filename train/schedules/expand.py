"""Expand: an epoch is every row under every context, as often as its weight says, in one shuffled order."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from kvopt.config.schedules import Schedule

if TYPE_CHECKING:
    from kvopt.train.stream import Stream


class Expand(Schedule):
    """Every row under every context once an epoch (``weight`` times)."""

    kind: Literal["expand"] = "expand"
    whole_weights: ClassVar[bool] = True

    def per_epoch(self, stream: Stream) -> int:
        """Rows times the sum of the weights."""
        return stream.rows * len(_copies(stream))

    def row(self, stream: Stream, position: int) -> int:
        """The row of the copy at this place of the epoch's order."""
        return self._place(stream, position) % stream.rows

    def context(self, stream: Stream, position: int, kept: tuple[int, ...]) -> int:
        """The context of that copy."""
        return _copies(stream)[self._place(stream, position) // stream.rows]

    def _place(self, stream: Stream, position: int) -> int:
        epoch, place = divmod(position, self.per_epoch(stream))
        return stream.order(self.per_epoch(stream), epoch)[place]


def _copies(stream: Stream) -> list[int]:
    """Each context as often as it weighs."""
    return [context for context, weight in enumerate(stream.weights) for _ in range(int(weight))]
