"""Please comes or goes."""

from __future__ import annotations

import re
from random import Random

from kvopt.mutate.blocks import capitalize, lower_first, replace_spans, some, units
from kvopt.mutate.operator import operator
from kvopt.mutate.spans import Field
from kvopt.mutate.vocabulary import starts_imperative

ADVERBED = re.compile(r"(Always|Do not|Don't|Don’t|Never) (?=[a-z])")


@operator("add-please", "lexical")
def add_please(field: Field, rng: Random) -> str | None:
    """``Write …`` → ``Please write …`` for one, some or all instructions."""
    if re.search(r"\bplease\b", field.text, re.I):
        return None
    changes = []
    for start, end in units(field.text):
        sentence = field.text[start:end]
        if sentence[:1].isupper() and (starts_imperative(sentence) or ADVERBED.match(sentence)) and "?" not in sentence:
            changes.append((start, end, "Please " + lower_first(sentence)))
    chosen = some(rng, changes[:1] if rng.random() < 0.5 else changes)
    return replace_spans(field.text, chosen) if chosen else None


@operator("drop-please", "lexical")
def drop_please(field: Field, rng: Random) -> str | None:
    """``Please write …`` → ``Write …``."""
    changes = []
    for start, end in units(field.text):
        sentence = field.text[start:end]
        if match := re.match(r"(?:Please|Kindly),? (?=[a-z])", sentence):
            changes.append((start, end, capitalize(sentence[match.end() :])))
    return replace_spans(field.text, some(rng, changes)) if changes else None
