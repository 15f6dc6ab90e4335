"""What every metric has in common: it looks at one answer and gives ratios; a ratio of sums over examples is the value.

Exact match is Σ hits / Σ 1; precision is Σ tp / Σ (tp + fp); a judge's score is Σ score / Σ judged. So means, micro
averages and bootstrap draws of every metric are computed in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

Ratio = tuple[float, float]
"""Numerator and denominator of one example; a denominator of 0 leaves the example out."""
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Item:
    """One answer to look at: the slot ``values`` of the example, its ``gold`` output, and the ``answer``."""

    example_id: str
    values: Mapping[str, str]
    gold: str
    answer: str


@dataclass(frozen=True)
class Verdict:
    """What a metric says about one answer: ``ratios`` by quantity, and a ``note`` for the record (a judge's reply)."""

    ratios: Mapping[str, Ratio]
    note: str | None = None


@dataclass(frozen=True)
class Metric:
    """One way to look at answers.

    Attributes:
        name: as it is called in results.
        remote: answers leave this machine and take time: verdicts are stored.
    """

    name: str
    remote: ClassVar[bool] = False

    @property
    def headline(self) -> str:
        """The quantity that stands for the metric in tables (where it gives no such quantity: its first)."""
        return self.name

    def doubt(self, gold: Sequence[str]) -> str | None:
        """Why the metric says little on these gold outputs; None where nothing speaks against it."""
        return None

    def verdict(self, item: Item) -> Verdict:
        """What the metric says about one answer."""
        raise NotImplementedError

    def verdicts(self, items: Sequence[Item], progress: Progress | None = None) -> list[Verdict]:
        """One verdict for each answer, in order."""
        found = []
        for item in items:
            found.append(self.verdict(item))
            if progress:
                progress(1)
        return found

    def passed(self, item: Item) -> bool:
        """Whether an answer gets the whole of the headline quantity: what a check asks."""
        ratios = self.verdict(item).ratios
        numerator, denominator = ratios.get(self.headline) or next(iter(ratios.values()))
        return denominator > 0 and numerator >= denominator


def share(name: str, hit: bool) -> Verdict:
    """The verdict of a metric that is a share of answers."""
    return Verdict({name: (float(hit), 1.0)})
