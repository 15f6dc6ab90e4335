"""Other ways to forbid."""

from __future__ import annotations

import re
from random import Random

from kvopt.mutate.operators.registry import operator
from kvopt.mutate.spans import Field
from kvopt.mutate.text import replace_spans, some, units
from kvopt.mutate.vocabulary import IMPERATIVES

FORBID = re.compile(
    r"(Do not|Don['’]t|Never|You must not|You should never|You must never|You should not) "
    r"([a-z]+)\b"
)
WAYS = ("Do not", "Never", "You must not", "You must never")
GERUNDS = {
    "add": "adding",
    "include": "including",
    "use": "using",
    "invent": "inventing",
    "repeat": "repeating",
    "mention": "mentioning",
    "write": "writing",
    "explain": "explaining",
    "make": "making",
    "copy": "copying",
    "change": "changing",
    "guess": "guessing",
    "describe": "describing",
    "start": "starting",
    "begin": "beginning",
    "end": "ending",
    "put": "putting",
}
