"""Share of answers that a regular expression finds something in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from kvopt.train.metrics.base import Item, Metric, Verdict, share


@dataclass(frozen=True)
class Regex(Metric):
    """1 where ``pattern`` matches (Python's ``re``; with ``whole``, the stripped answer from end to end); with
    ``absent``, where it does not.
    """

    pattern: str = ""
    whole: bool = False
    absent: bool = False

    @cached_property
    def _compiled(self) -> re.Pattern[str]:
        return re.compile(self.pattern)

    def verdict(self, item: Item) -> Verdict:
        found = self._compiled.fullmatch(item.answer.strip()) if self.whole else self._compiled.search(item.answer)
        return share(self.name, (found is None) == self.absent)
