"""Imperatives become statements about you or the assistant, and back."""

from __future__ import annotations

import re
from random import Random

from kvopt.mutate.blocks import capitalize, lower_first, replace_spans, some, units
from kvopt.mutate.operator import operator
from kvopt.mutate.spans import Field
from kvopt.mutate.vocabulary import IMPERATIVES, starts_imperative

MODALS = ("should", "must", "are to", "need to", "have to")
MIXED = re.compile(r"[;:?]|\b(?:and|but|or|then),? (?:do not|don['’]t|never|always|please|you)\b|\bplease\b", re.I)
SECOND_PERSON = re.compile(r"\b(you|your|yours|yourself)\b", re.I)
STATED = re.compile(
    r"(?:You|The assistant) (should|must|are to|need to|have to|is to|needs to|has to) (not |never |always )?([a-z]+)\b"
)


@operator("to-declarative", "lexical")
def to_declarative(field: Field, rng: Random) -> str | None:
    """``Write X.`` → ``You should write X.`` or ``The assistant must write X.``, one way for all sentences that it
    changes.
    """
    modal = rng.choice(MODALS)
    spoken_to = bool(SECOND_PERSON.search(field.text))
    subject = rng.choice(["You", "You", "You", "The assistant"]) if not spoken_to else "You"
    if subject != "You":
        modal = {"are to": "is to", "need to": "needs to", "have to": "has to"}.get(modal, modal)
    changes = []
    for start, end in units(field.text):
        sentence = field.text[start:end]
        if not MIXED.search(sentence) and (statement := _declared(sentence, subject, modal)):
            changes.append((start, end, statement))
    return replace_spans(field.text, some(rng, changes)) if changes else None


def _declared(sentence: str, subject: str, modal: str) -> str | None:
    if not sentence[:1].isupper():
        return None
    match = re.match(r"(Do not|Don['’]t|Never|Always) ([a-z]+)\b", sentence)
    if match:
        if match[2] not in IMPERATIVES and match[2] != "be":
            return None
        simple = modal if modal in {"should", "must"} else "must"
        adverb = {"never": "never", "always": "always"}.get(match[1].lower(), "not")
        return f"{subject} {simple} {adverb} {match[2]}{sentence[match.end() :]}"
    return f"{subject} {modal} {lower_first(sentence)}" if starts_imperative(sentence) else None


@operator("to-imperative", "lexical")
def to_imperative(field: Field, rng: Random) -> str | None:
    """``You should write X.`` → ``Write X.``, ``You must not X`` → ``Do not X``."""
    changes = []
    for start, end in units(field.text):
        sentence = field.text[start:end]
        match = STATED.match(sentence)
        if not match or match[3] not in IMPERATIVES:
            continue
        adverb = {"not": "Do not ", "never": "Never ", "always": "Always "}.get((match[2] or "").strip(), "")
        changes.append((start, end, adverb + (match[3] if adverb else capitalize(match[3])) + sentence[match.end() :]))
    return replace_spans(field.text, some(rng, changes)) if changes else None
