"""Another style of quotes and apostrophes."""

from __future__ import annotations

import re
from random import Random

from kvopt.mutate.operator import operator
from kvopt.mutate.spans import MARK, Field

PAIRS = ('""', "“”", "''", "‘’")
QUOTED = re.compile(rf"([\"“'‘«])({MARK})([\"”'’»])")


@operator("quote-style", "syntax")
def quote_style(field: Field, rng: Random) -> str | None:
    """Quotes around phrases: straight, curly, single. What is quoted stays, and quoted labels keep their quotes."""
    if not QUOTED.search(field.text):
        return None
    pair = rng.choice(PAIRS)
    return QUOTED.sub(lambda m: m[0] if field.holds_slot(m[2]) else pair[0] + m[2] + pair[1], field.text)


@operator("apostrophes", "syntax")
def apostrophes(field: Field, rng: Random) -> str | None:
    """``user's`` ↔ ``user’s``, everywhere in the field."""
    if re.search(r"(?<=[A-Za-z])'(?=[A-Za-z])", field.text):
        return re.sub(r"(?<=[A-Za-z])'(?=[A-Za-z])", "’", field.text)
    if re.search(r"(?<=[A-Za-z])’(?=[A-Za-z])", field.text):
        return re.sub(r"(?<=[A-Za-z])’(?=[A-Za-z])", "'", field.text)
    return None
