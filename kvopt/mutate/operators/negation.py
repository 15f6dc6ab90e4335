"""Other ways to forbid."""

from __future__ import annotations

import re
from random import Random

from kvopt.mutate.blocks import replace_spans, some, units
from kvopt.mutate.operator import operator
from kvopt.mutate.spans import Field
from kvopt.mutate.vocabulary import IMPERATIVES

FORBID = re.compile(r"(Do not|Don['’]t|Never|You must not|You should never|You must never|You should not) ([a-z]+)\b")
WAYS = ("Do not", "Never", "You must not", "You must never")
GERUNDS = {
    "add": "adding", "include": "including", "use": "using", "invent": "inventing", "repeat": "repeating",
    "mention": "mentioning", "write": "writing", "explain": "explaining", "make": "making", "copy": "copying",
    "change": "changing", "guess": "guessing", "describe": "describing", "start": "starting", "begin": "beginning",
    "end": "ending", "put": "putting",
}  # fmt: skip
AVOID = re.compile(rf"Avoid ({'|'.join(GERUNDS.values())})\b")
COORDINATED = re.compile(r"[,;]|\b(and|but)\b")


@operator("negation", "lexical")
def negation(field: Field, rng: Random) -> str | None:
    """``Do not X`` ↔ ``Never X`` ↔ ``You must not X`` ↔ ``Avoid X-ing``, at the beginning of a sentence or item."""
    changes = []
    for start, end in units(field.text):
        sentence = field.text[start:end]
        if match := FORBID.match(sentence):
            verb = match[2]
            if verb not in IMPERATIVES and verb not in {"change", "be"}:
                continue
            options = [f"{way} {verb}" for way in WAYS if way != match[1]]
            if verb in GERUNDS and not COORDINATED.search(sentence):
                options.append(f"Avoid {GERUNDS[verb]}")
            changes.append((start, start + match.end(), rng.choice(options)))
        elif (match := AVOID.match(sentence)) and not COORDINATED.search(sentence):
            verb = next(v for v, gerund in GERUNDS.items() if gerund == match[1])
            changes.append((start, start + match.end(), f"{rng.choice(['Do not', 'Never'])} {verb}"))
    return replace_spans(field.text, some(rng, changes)) if changes else None
