"""Share of answers that a regular expression finds something in."""

from __future__ import annotations

import re
from functools import cached_property
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from kvopt.config.metrics import Item, Metric, Verdict


class Regex(Metric):
    """Share of answers that a regular expression matches."""

    kind: Literal["regex"]
    pattern: str = Field(description="a regular expression of Python")
    whole: bool = Field(False, description="the stripped answer must match from end to end")
    absent: bool = Field(False, description="the share of answers in which it is not found")
    pass_or_fail: ClassVar[bool] = True

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"is not a regular expression: {error}") from None
        return value

    @cached_property
    def _compiled(self) -> re.Pattern[str]:
        return re.compile(self.pattern)

    def verdict(self, item: Item) -> Verdict:
        """1 where ``pattern`` matches; with ``absent``, where it does not."""
        match = self._compiled.fullmatch(item.answer.strip()) if self.whole else self._compiled.search(item.answer)
        return self.share((match is None) == self.absent)
