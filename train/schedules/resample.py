"""Resample: an epoch is every row once, each under a context that is drawn anew for each row and epoch; with ``every``
all rows of so many steps under one context, as PAFT has it (arXiv 2502.12859).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from kvopt.config.schedules import Schedule

if TYPE_CHECKING:
    from kvopt.train.stream import Stream


class Resample(Schedule):
    """Every row once an epoch, its context drawn anew each time, in proportion to the weights."""

    kind: Literal["resample"] = "resample"
    every: int | None = Field(
        None,
        ge=1,
        exclude_if=lambda every: every is None,  # students were stored before there was a choice
        description="steps that all rows meet the same context for; default: each row has a draw of its own",
    )

    @property
    def by_step(self) -> bool:
        """With ``every``."""
        return self.every is not None

    def context(self, stream: Stream, position: int, kept: tuple[int, ...]) -> int:
        """One of all."""
        if self.every is not None:
            return stream.context_of_steps(position, self.every)
        return stream.drawn_context(position, range(len(stream.weights)))
