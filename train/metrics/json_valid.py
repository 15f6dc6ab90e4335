"""Share of answers that are valid JSON and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from kvopt.train.metrics.base import Item, Metric, Verdict, share
from kvopt.train.metrics.json_answers import NotJSON, parse_json


@dataclass(frozen=True)
class JSONValid(Metric):
    """1 where the answer parses; with ``container``, only an object or a list counts (a bare number is JSON too)."""

    container: bool = True

    def verdict(self, item: Item) -> Verdict:
        try:
            value = parse_json(item.answer)
        except NotJSON:
            return share(self.name, False)
        return share(self.name, not self.container or isinstance(value, dict | list))
