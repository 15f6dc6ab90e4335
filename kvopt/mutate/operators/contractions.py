"""Contractions are made or undone."""

from __future__ import annotations

import re
from random import Random

from kvopt.mutate.blocks import replace_spans, some
from kvopt.mutate.operator import operator
from kvopt.mutate.spans import Field

NOT = {"do": "don", "does": "doesn", "did": "didn", "is": "isn", "are": "aren", "was": "wasn", "were": "weren", "should": "shouldn",  # noqa: E501
       "would": "wouldn", "could": "couldn", "has": "hasn", "have": "haven"}  # fmt: skip
LONG = re.compile(rf"\b({'|'.join(NOT)}) not\b|\b(cannot|can not)\b|\b(will not)\b", re.I)
SHORT = re.compile(rf"\b(?:({'|'.join(NOT.values())})|(ca)|(wo))n?['’]t\b", re.I)
YOU_ARE = re.compile(r"\b(you|they|we)( are|['’]re)\b(?= [a-z])(?! (?:and|or|not|n['’]t)\b)", re.I)


@operator("contract", "lexical")
def contract(field: Field, rng: Random) -> str | None:
    """``do not`` → ``don't``, ``cannot`` → ``can't``, ``you are`` → ``you're``."""
    apostrophe = "’" if "’" in field.text else "'"
    changes = [(*m.span(), _short(m, apostrophe)) for m in LONG.finditer(field.text) if not m[0].isupper()]
    for match in YOU_ARE.finditer(field.text):
        if match[2].startswith(" "):
            changes.append((*match.span(), f"{match[1]}{apostrophe}re"))
    return replace_spans(field.text, some(rng, sorted(changes))) if changes else None


def _short(match: re.Match[str], apostrophe: str) -> str:
    word = match[0].split()[0]
    if match[2]:
        return word[:2] + f"n{apostrophe}t"
    if match[3]:
        return word[0] + f"on{apostrophe}t"
    return f"{word}n{apostrophe}t"


@operator("expand", "lexical")
def expand(field: Field, rng: Random) -> str | None:
    """``don't`` → ``do not``, ``can't`` → ``cannot``, ``you're`` → ``you are``."""
    changes = [(*m.span(), _long(m)) for m in SHORT.finditer(field.text) if not m[0].isupper()]
    for match in YOU_ARE.finditer(field.text):
        if not match[2].startswith(" "):
            changes.append((*match.span(), f"{match[1]} are"))
    return replace_spans(field.text, some(rng, sorted(changes))) if changes else None


def _long(match: re.Match[str]) -> str:
    if match[2]:
        return match[2] + "nnot"
    if match[3]:
        return match[3][0] + "ill not"
    return f"{match[1][:-1] if match[1].lower() != 'don' else match[1][:2]} not"
