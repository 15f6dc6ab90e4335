"""Precision, recall and F1 over the key/value pairs of a JSON answer, micro-averaged over examples.

With tp pairs in both, fp in the answer alone and fn in the gold output alone: precision tp / (tp + fp), recall
tp / (tp + fn), F1 2 tp / (2 tp + fp + fn), each a ratio of sums over all examples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from kvopt.config.metrics import Item, Metric, Verdict
from kvopt.train.json_answers import NotJSON, at_path, pairs_of, parse_json


class Slots(Metric):
    """Precision, recall and F1 over the key/value pairs of a JSON answer, micro over examples."""

    kind: Literal["slots"]
    path: str | None = Field(None, description="dotted keys of the object whose pairs count; default: all")
    ignore_case: bool = Field(False, description="values that differ in case alone are the same")

    @property
    def headline(self) -> str:
        """F1."""
        return f"{self.label}.f1"

    def doubt(self, gold: Sequence[str]) -> str | None:
        """Where no gold output has pairs."""
        if any(map(self._pairs, gold)):
            return None
        return (
            f"no gold output has key/value pairs{f' under {self.path!r}' if self.path else ''}, so there is no recall"
        )

    def verdict(self, item: Item) -> Verdict:
        """Of pairs under ``path``. An answer that is no JSON has no pairs."""
        answered, wanted = self._pairs(item.answer), self._pairs(item.gold)
        tp = (answered & wanted).total()
        return Verdict(
            {
                f"{self.label}.precision": (tp, answered.total()),
                f"{self.label}.recall": (tp, wanted.total()),
                f"{self.label}.f1": (2 * tp, answered.total() + wanted.total()),
            }
        )

    def _pairs(self, text: str) -> Counter[tuple[str, str]]:
        try:
            return pairs_of(at_path(parse_json(text), self.path), ignore_case=self.ignore_case)
        except NotJSON:
            return Counter()
