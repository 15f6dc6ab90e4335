"""Progress of long work on stderr: a line a stage, and bars on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """``say`` gets a line for each stage; ``bars`` says whether bars are shown (None: only on a terminal)."""

    say: Callable[[str], None]
    bars: bool | None = None

    def bar(self, title: str, total: int, unit: str = "row") -> tqdm:
        """A bar that disappears when it is done."""
        disable = None if self.bars is None else not self.bars
        return tqdm(
            total=total, desc=title, unit=unit, disable=disable, file=sys.stderr, leave=False, dynamic_ncols=True
        )

    def over(self, title: str, items: Sequence[T]) -> Iterator[T]:
        """Go over contexts with a bar."""
        if items:
            self.say(f"{title}: {len(items)}")
        with self.bar(title, len(items), unit="context") as bar:
            for item in items:
                yield item
                bar.update(1)


def advance(bar: tqdm) -> Callable[[int], None]:
    """A callback that moves the bar on by so many."""

    def by(count: int) -> None:
        bar.update(count)

    return by


def step_reporter(bar: tqdm) -> Callable[[int, float | None, float | None], None]:
    """The ``report`` of :func:`kvopt.learn.descent.optimize`: steps, and train and held-out KL beside the bar."""
    shown: dict[str, str] = {}

    def report(step: int, train: float | None, held_out: float | None) -> None:
        if train is not None:
            shown["train"] = f"{train:.4f}"
        if held_out is not None:
            shown["held-out"] = f"{held_out:.4f}"
        bar.set_postfix(shown)
        bar.update(step - bar.n)

    return report
