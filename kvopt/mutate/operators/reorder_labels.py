"""The labels of an inline list change places."""

from __future__ import annotations

import re
from random import Random

from kvopt.mutate.operator import operator
from kvopt.mutate.spans import MARK, Field

INLINE = re.compile(rf"{MARK}(?:, {MARK})+(?:,? (?:and|or) {MARK})?|{MARK} (?:and|or) {MARK}")


@operator("reorder-labels", "structure")
def reorder_labels(field: Field, rng: Random) -> str | None:
    """``A, B and C`` → ``B, C and A``, for lists of protected labels alone, no slot or number among them."""
    sites = []
    for match in INLINE.finditer(field.text):
        marks = re.findall(MARK, match[0])
        literals = [field.unmasked(mark) for mark in marks]
        if not any(field.holds_slot(mark) for mark in marks) and not any(
            c.isdigit() for text in literals for c in text
        ):
            sites.append(match)
    if not sites:
        return None
    site = rng.choice(sites)
    marks = re.findall(MARK, site[0])
    rng.shuffle(marks)
    order = iter(marks)
    return field.text[: site.start()] + re.sub(MARK, lambda _: next(order), site[0]) + field.text[site.end() :]
