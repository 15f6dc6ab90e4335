"""The comma before the last member of a series comes or goes."""

from __future__ import annotations

import re
from random import Random

from kvopt.mutate.operator import operator
from kvopt.mutate.spans import MARK, Field

WITH = re.compile(rf"((?:{MARK}|\b[\w-]+)(?:, (?:{MARK}|[\w-]+))+), (and|or) (?=(?:{MARK}|[\w-]+)(?:[.;:)\s]|$))")
WITHOUT = re.compile(rf"((?:{MARK}|\b[\w-]+)(?:, (?:{MARK}|[\w-]+))+) (and|or) (?=(?:{MARK}|[\w-]+)(?:[.;:)\s]|$))")


@operator("list-comma", "syntax")
def list_comma(field: Field, rng: Random) -> str | None:
    """``a, b, and c`` ↔ ``a, b and c`` throughout the field."""
    if WITH.search(field.text):
        return WITH.sub(r"\1 \2 ", field.text)
    if WITHOUT.search(field.text):
        return WITHOUT.sub(r"\1, \2 ", field.text)
    return None
