"""Share of answers that equal the gold output."""

from __future__ import annotations

import re
import string
from dataclasses import dataclass

from kvopt.train.metrics.base import Item, Metric, Verdict, share
from kvopt.train.metrics.json_answers import NotJSON, canonical, parse_json

_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class ExactMatch(Metric):
    """1 where answer and gold are equal after ``normalize``: any of strip, case, spaces, punctuation, json."""

    normalize: tuple[str, ...] = ("strip",)

    def verdict(self, item: Item) -> Verdict:
        return share(self.name, self._plain(item.answer) == self._plain(item.gold))

    def _plain(self, text: str) -> str:
        if "json" in self.normalize:
            try:
                return canonical(parse_json(text))
            except NotJSON:
                pass
        if "strip" in self.normalize:
            text = text.strip()
        if "case" in self.normalize:
            text = text.casefold()
        if "punctuation" in self.normalize:
            text = text.translate(_PUNCTUATION)
        if "spaces" in self.normalize:
            text = re.sub(r"\s+", " ", text).strip()
        return text
