"""Precision, recall and F1 over the key/value pairs of a JSON answer, micro-averaged over examples.

With tp pairs in both, fp in the answer alone and fn in the gold output alone: precision tp / (tp + fp), recall
tp / (tp + fn), F1 2 tp / (2 tp + fp + fn), each a ratio of sums over all examples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kvopt.train.metrics.base import Item, Metric, Verdict
from kvopt.train.metrics.json_answers import NotJSON, at_path, pairs_of, parse_json


@dataclass(frozen=True)
class Slots(Metric):
    """Pairs under the dotted ``path`` of keys (None: the whole value). An answer that is no JSON has no pairs."""

    path: str | None = None
    ignore_case: bool = False

    @property
    def headline(self) -> str:
        return f"{self.name}.f1"

    def doubt(self, gold: Sequence[str]) -> str | None:
        if any(map(self._pairs, gold)):
            return None
        return (
            f"no gold output has key/value pairs{f' under {self.path!r}' if self.path else ''}, so there is no recall"
        )

    def verdict(self, item: Item) -> Verdict:
        found, gold = self._pairs(item.answer), self._pairs(item.gold)
        tp, answered, wanted = (found & gold).total(), found.total(), gold.total()
        return Verdict(
            {
                f"{self.name}.precision": (tp, answered),
                f"{self.name}.recall": (tp, wanted),
                f"{self.name}.f1": (2 * tp, answered + wanted),
            }
        )

    def _pairs(self, text: str) -> Counter[tuple[str, str]]:
        try:
            return pairs_of(at_path(parse_json(text), self.path), ignore_case=self.ignore_case)
        except NotJSON:
            return Counter()
