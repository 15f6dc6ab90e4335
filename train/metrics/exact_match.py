"""Share of answers that equal the gold output."""

from __future__ import annotations

import re
import string
from typing import ClassVar, Literal

from pydantic import Field

from kvopt.config.metrics import Item, Metric, Verdict
from kvopt.train.json_answers import NotJSON, canonical, parse_json

_PUNCTUATION = str.maketrans("", "", string.punctuation)


class ExactMatch(Metric):
    """Share of answers that equal the gold output."""

    kind: Literal["exact-match"]
    normalize: tuple[Literal["strip", "case", "spaces", "punctuation", "json"], ...] = Field(
        ("strip",), description="what is made equal first; json compares parsed values"
    )
    pass_or_fail: ClassVar[bool] = True

    def verdict(self, item: Item) -> Verdict:
        """1 where answer and gold are equal after ``normalize``."""
        return self.share(self._plain(item.answer) == self._plain(item.gold))

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
