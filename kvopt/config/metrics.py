"""What a metric is: it looks at one answer and gives ratios; a ratio of sums over examples is its value. Each file of
``train/metrics/`` is one.

Exact match is Σ hits / Σ 1; precision is Σ tp / Σ (tp + fp); a judge's score is Σ score / Σ judged. So means, micro
averages and bootstrap draws of every metric are computed in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from kvopt.config.kinds import Family, Options
from kvopt.config.section import LABEL

METRICS: Family[Metric] = Family("kvopt.train.metrics", "metric")
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


class Metric(Options):
    """One way to look at answers, with its options.

    Attributes:
        pass_or_fail: an answer passes or fails, so that it can be a check (``checks``, ``own_answers.accept``).
        remote: answers leave this machine and take time: verdicts are stored.
    """

    pass_or_fail: ClassVar[bool] = False
    remote: ClassVar[bool] = False

    name: str | None = Field(None, pattern=LABEL, description="how results call it; default: its kind")

    @property
    def label(self) -> str:
        """How results call it."""
        return self.name or self.kind

    @property
    def place(self) -> str:
        """The key of the config that errors name."""
        return f"evaluate.metrics.{self.label}"

    @property
    def headline(self) -> str:
        """The quantity that stands for the metric in tables (where it gives no such quantity: its first)."""
        return self.label

    def headline_among(self, quantities: Sequence[str]) -> str:
        """:attr:`headline`, or the metric's first of these ``quantities`` where they lack it."""
        own = (name for name in quantities if name.startswith(f"{self.label}."))
        return self.headline if self.headline in quantities else next(own, self.headline)

    def prepared(self, base_dir: Path) -> Metric:
        """The metric with all that it needs: its files are read, its packages are there. Called before any work.

        Args:
            base_dir: the config's folder, to which paths are relative.

        Raises:
            InputError: a file or a package is absent, or cannot be used.
        """
        return self

    def doubt(self, gold: Sequence[str]) -> str | None:
        """Why the metric says little on these gold outputs; None where nothing speaks against it."""
        return None

    def verdict(self, item: Item) -> Verdict:
        """What the metric says about one answer."""
        raise NotImplementedError

    def verdicts(self, items: Sequence[Item], progress: Progress | None = None) -> list[Verdict]:
        """One verdict for each answer, in order."""
        verdicts = []
        for item in items:
            verdicts.append(self.verdict(item))
            if progress:
                progress(1)
        return verdicts

    def passed(self, item: Item) -> bool:
        """Whether an answer gets the whole of the headline quantity: what a check asks."""
        ratios = self.verdict(item).ratios
        numerator, denominator = ratios.get(self.headline) or next(iter(ratios.values()))
        return denominator > 0 and numerator >= denominator

    def share(self, hit: bool) -> Verdict:
        """The verdict of a metric that is a share of answers."""
        return Verdict({self.label: (float(hit), 1.0)})


def spelled_out(value: Any) -> Any:
    """A metric's kind alone, or ``python:…``, as the mapping that it is short for."""
    if isinstance(value, str):
        return {"kind": "python", "target": value} if value.startswith("python:") else {"kind": value}
    return value


def check_distinct(metrics: Sequence[Metric], what: str) -> None:
    """Raises ValueError where two of them would have the same name in results."""
    labels = [metric.label for metric in metrics]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"two {what} are called {label!r}: give one of them a name")
