"""Words that stress are set in capitals or bold."""

from __future__ import annotations

import re
from random import Random

from kvopt.mutate.blocks import replace_spans, some
from kvopt.mutate.operator import operator
from kvopt.mutate.spans import Field

WORDS = re.compile(r"\b(do not|must not|should not|never|always|must|only|exactly)\b", re.I)
STRESSED = re.compile(r"\b(DO NOT|MUST NOT|SHOULD NOT|NEVER|ALWAYS|MUST|ONLY|EXACTLY|NOT)\b")


@operator("emphasis", "syntax")
def emphasis(field: Field, rng: Random) -> str | None:
    """``never`` ↔ ``NEVER`` or ``**never**``."""
    bold = r"\*\*(do not|must not|should not|never|always|must|only|exactly|not)\*\*"
    if re.search(bold, field.text, re.I):
        return re.sub(bold, lambda m: m[1], field.text, flags=re.I)
    if STRESSED.search(field.text):
        return STRESSED.sub(lambda m: _calm(field.text, m), field.text)
    if not (matches := list(WORDS.finditer(field.text))):
        return None
    shape = rng.choice(["{}", "**{}**"])
    change = str.upper if shape == "{}" else str
    return replace_spans(field.text, [(*m.span(), shape.format(change(m[0]))) for m in some(rng, matches)])


def _calm(text: str, match: re.Match[str]) -> str:
    starts = re.search(r"(^|[.!?:]\s+|^\s*\S{1,3}\s+)$", text[: match.start()], re.M)
    return match[0].capitalize() if starts else match[0].lower()
