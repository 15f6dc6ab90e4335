"""A lead-in and what follows it share a line or not."""

from __future__ import annotations

import re
from random import Random

from kvopt.mutate.operator import operator
from kvopt.mutate.spans import MARK, Field

SHORT_LABEL = re.compile(rf"^([A-Z][A-Za-z' ]{{1,30}}):([ \t]+|\r?\n)(?={MARK}$|{MARK}\r?\n)", re.M)


@operator("label-break", "syntax")
def label_break(field: Field, rng: Random) -> str | None:
    """``Text: {{slot}}`` ↔ ``Text:`` and the slot on the next line."""
    matches = [m for m in SHORT_LABEL.finditer(field.text) if field.unmasked(field.text[m.end()]).startswith("{{")]
    if not matches:
        return None
    match = rng.choice(matches)
    gap = " " if "\n" in match[2] else field.newline
    return field.text[: match.start(2)] + gap + field.text[match.end(2) :]
