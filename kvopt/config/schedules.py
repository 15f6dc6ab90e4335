"""What a schedule is: the ``schedule`` section of a student. It says which row meets which context at which position of
the training stream. Each file of ``train/schedules/`` is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from kvopt.config.kinds import Family, Options

SCHEDULES: Family[Schedule] = Family("kvopt.train.schedules", "schedule")


class Schedule(Options):
    """A schedule with its options. As it stands here, an epoch is every row once, in a shuffled order.

    Every ``stream`` is a :class:`kvopt.train.stream.Stream`: the number of rows, the weights of the contexts, seeded
    orders and draws. An answer is a function of the stream and the position alone, so a resumed run meets what an
    uninterrupted one meets, and several processes share one stream.

    Attributes:
        whole_weights: weights of contexts must be whole numbers.
        adapts: it scores the contexts under the student while that is trained, and chooses among them.
    """

    whole_weights: ClassVar[bool] = False
    adapts: ClassVar[bool] = False

    def per_epoch(self, stream: Any) -> int:
        """Items an epoch."""
        return int(stream.rows)

    def row(self, stream: Any, position: int) -> int:
        """The row at a position of the stream; it never depends on the student."""
        return int(stream.shuffled_row(position))

    def context(self, stream: Any, position: int, kept: tuple[int, ...]) -> int:
        """The context that it meets. ``kept`` are the contexts chosen last, positions in the pool; only a schedule that
        adapts looks at it.
        """
        raise NotImplementedError

    @property
    def by_step(self) -> bool:
        """Whether all rows of a step meet the same context."""
        return False

    # ---- of those that adapt

    @property
    def scored_rows(self) -> int:
        """Training rows that the contexts are scored on, from the first on."""
        return 0

    def rescores_at(self, step: int) -> bool:
        """Whether the contexts are scored before this step (from 0)."""
        return False

    def choose(self, nll: Sequence[float]) -> tuple[int, ...]:
        """The contexts to keep, in the pool's order, by the gold NLL of each under the student as it is now."""
        raise NotImplementedError
