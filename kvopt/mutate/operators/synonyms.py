"""Function phrases are replaced by others of the same meaning."""

from __future__ import annotations

import re
from functools import cache
from random import Random

from kvopt.mutate.blocks import capitalize, replace_spans
from kvopt.mutate.operator import operator
from kvopt.mutate.phrases import CONTEXTUAL, GROUPS
from kvopt.mutate.spans import Field


@cache
def _index() -> tuple[re.Pattern[str], dict[str, tuple[str, ...]]]:
    """One pattern for all phrases (longest first) and, for each phrase, the others of its group."""
    others = {phrase: tuple(o for o in group if o != phrase) for group in GROUPS for phrase in group}
    longest = sorted(others, key=lambda phrase: (-len(phrase), phrase))
    return re.compile(rf"(?<![\w'’-])(?:{'|'.join(map(re.escape, longest))})(?![\w'’-])", re.I), others


@operator("synonyms", "lexical")
def synonyms(field: Field, rng: Random) -> str | None:
    """From one to all of the known phrases in the field are exchanged (see :mod:`kvopt.mutate.phrases`)."""
    pattern, others = _index()
    changes = [(*m.span(), _like(m[0], rng.choice(others[m[0].lower()]))) for m in pattern.finditer(field.text)]
    for contextual, options in CONTEXTUAL:
        for match in contextual.finditer(field.text):
            current = match["x"]
            choices = [option for option in options if option != current.lower()]
            changes.append((*match.span("x"), _like(current, rng.choice(choices))))
    changes = [change for change in changes if _article_fits(field.text, change)]
    rng.shuffle(changes)
    wanted = rng.choice([1, 2, 3, len(changes)]) if changes else 0
    chosen: list[tuple[int, int, str]] = []
    for change in changes:
        if len(chosen) < wanted and all(change[1] <= c[0] or change[0] >= c[1] for c in chosen):
            chosen.append(change)
    return replace_spans(field.text, chosen) if chosen else None


def _like(old: str, new: str) -> str:
    """``new`` with the case of ``old``."""
    if len(old) > 3 and old.isupper():
        return new.upper()
    return capitalize(new) if old[:1].isupper() else new


def _article_fits(text: str, change: tuple[int, int, str]) -> bool:
    """Whether "a"/"an" in front of the phrase still fits."""
    start, end, new = change
    if not re.search(r"\b(a|an) $", text[:start], re.I):
        return True
    return (new[0].lower() in "aeiou") == (text[start:end][0].lower() in "aeiou")
