"""Progress of long work on stderr: bars on a terminal; elsewhere a line when a stage starts, and one every 30 seconds.

Both say where the work stands, what was measured last, and about how long the rest takes. The estimate counts what this
process did, not what it took over from an earlier one. rich does the drawing.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TypeVar

from rich import progress as drawing
from rich.console import Console

from kvopt.errors import counted

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 30.0
INSTANT = 0.05
"""Seconds: an item of :meth:`Progress.over` that took less was there already."""


@cache
def screen() -> Console:
    """Standard error for what is drawn in place; bars and a live table share it, so that they do not overwrite each
    other.
    """
    return Console(stderr=True, highlight=False)


def is_terminal() -> bool:
    """Whether something can be drawn in place on stderr."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def duration(seconds: float) -> str:
    """``40 s``, ``3 min`` or ``2.5 h``: as exact as an estimate can be."""
    if seconds < 90:
        return f"{max(1, round(seconds)) if seconds < 10 else 5 * round(seconds / 5)} s"
    return f"{round(seconds / 60)} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


@dataclass
class Bar:
    """One piece of work: how much of it is done.

    Attributes:
        title, unit: what it is, and what it is counted in (one of them: row, step, …).
        total: how much there is.
        done: how much of that is done, ``before`` of it by an earlier process.
        facts: what was measured last, such as ``{"held-out": "0.0127"}``.
    """

    title: str
    total: int
    unit: str
    clock: Callable[[], float]
    changed: Callable[[Bar], None]
    done: int = 0
    before: int = 0
    facts: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._start = self.clock()

    def update(self, count: int = 1) -> None:
        """So much more is done."""
        self.done += count
        self.changed(self)

    def take_over(self, count: int = 1) -> None:
        """So much was done before and is taken from there."""
        self.done += count
        self.before += count
        self.changed(self)

    @property
    def seconds_left(self) -> float | None:
        """What the rest takes at the pace of this process; None where it has no pace yet, or nothing is left."""
        here, seconds = self.done - self.before, self.clock() - self._start
        if here <= 0 or seconds <= 0 or self.done >= self.total:
            return None
        return (self.total - self.done) * seconds / here

    @property
    def standing(self) -> str:
        """``, held-out 0.0127, about 3 min left``: all but the count."""
        left = self.seconds_left
        parts = [f"{name} {value}" for name, value in self.facts.items()]
        parts += [f"about {duration(left)} left"] if left is not None else []
        return "".join(f", {part}" for part in parts)

    @property
    def line(self) -> str:
        """``kv-32 step 18/40, held-out 0.0127, about 3 min left``."""
        return f"{self.title} {self.unit} {self.done}/{self.total}{self.standing}"


class Progress:
    """Where work reports to.

    Args:
        say: gets the lines.
        bars: whether bars are drawn in place of lines about the work (None: on a terminal).
        clock: seconds, from any start.
        console: where bars are drawn.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        bars: bool | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        console: Console | None = None,
    ) -> None:
        self.say, self.bars, self.clock = say, bars, clock
        self._console = console
        self._drawn: drawing.Progress | None = None
        self._said = clock()

    @contextmanager
    def bar(self, title: str, total: int, unit: str = "row", begin: str | None = None) -> Iterator[Bar]:
        """Report on ``total`` units of work. ``begin`` is a line to say at its start, on a terminal too; without it a
        log gets the title and the count.
        """
        draws = is_terminal() if self.bars is None else self.bars
        if begin is not None or (total and not draws):
            self._say(begin or f"{title}: {counted(total, unit)}")
        if draws:
            with self._drawing() as view:
                task = view.add_task(title, total=total, text="")

                def redraw(bar: Bar) -> None:
                    at_once = (
                        bar.done == bar.before > 0
                    )  # where it goes on; else the screen is redrawn ten times a second
                    view.update(task, completed=bar.done, text=bar.standing.removeprefix(", "), refresh=at_once)

                try:
                    yield Bar(title, total, unit, self.clock, redraw)
                finally:
                    view.refresh()
                    view.remove_task(task)
        else:
            yield Bar(title, total, unit, self.clock, self._now_and_then)

    def over(self, title: str, items: Sequence[T], unit: str = "context") -> Iterator[T]:
        """Go over items with a bar."""
        with self.bar(title, len(items), unit) as bar:
            for item in items:
                start = self.clock()
                yield item
                (bar.take_over if self.clock() - start < INSTANT else bar.update)(1)

    @contextmanager
    def _drawing(self) -> Iterator[drawing.Progress]:
        """The bars that are on the screen, with those around this one."""
        if self._drawn is not None:
            yield self._drawn
            return
        columns = (
            drawing.TextColumn("{task.description}", markup=False),
            drawing.BarColumn(),
            drawing.MofNCompleteColumn(),
            drawing.TextColumn("{task.fields[text]}", markup=False),
        )
        with drawing.Progress(*columns, console=self._console or screen(), transient=True) as self._drawn:
            try:
                yield self._drawn
            finally:
                self._drawn = None

    def _say(self, line: str) -> None:
        self._said = self.clock()
        self.say(line)

    def _now_and_then(self, bar: Bar) -> None:
        if bar.done < bar.total and self.clock() - self._said >= SECONDS_BETWEEN_LINES:
            self._say(bar.line)


def advance(bar: Bar) -> Callable[[int], None]:
    """A callback that moves the bar on by so many."""
    return bar.update


def step_reporter(bar: Bar, train: str = "train", held_out: str = "held-out") -> Callable[..., None]:
    """A callback for work in steps: ``report(step, train, held_out)``, whose first call says which step this process
    begins at. Values that are None leave what was shown; ``train`` and ``held_out`` name them.
    """
    begun = False

    def report(step: int, train_value: float | None, held_out_value: float | None) -> None:
        nonlocal begun
        for name, value in ((train, train_value), (held_out, held_out_value)):
            if value is not None:
                bar.facts[name] = f"{value:.4f}"
        if begun:
            bar.update(step - bar.done)
        else:
            begun = True
            bar.take_over(step)

    return report


__all__ = ["Bar", "Progress", "advance", "duration", "is_terminal", "screen", "step_reporter"]
