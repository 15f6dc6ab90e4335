"""Share of answers that are valid JSON and nothing else."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from kvopt.config.metrics import Item, Metric, Verdict
from kvopt.train.json_answers import NotJSON, parse_json


class JSONValid(Metric):
    """Share of answers that are valid JSON and nothing else."""

    kind: Literal["json-valid"]
    container: bool = Field(True, description="only objects and lists count")
    pass_or_fail: ClassVar[bool] = True

    def verdict(self, item: Item) -> Verdict:
        """1 where the answer parses; with ``container``, a bare number, which is JSON too, does not count."""
        try:
            value = parse_json(item.answer)
        except NotJSON:
            return self.share(False)
        return self.share(not self.container or isinstance(value, dict | list))
