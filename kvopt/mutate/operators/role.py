"""Other ways to assign the role and the task."""

from __future__ import annotations

import re
from random import Random

from kvopt.mutate.blocks import capitalize, replace_spans, some, units
from kvopt.mutate.operator import operator
from kvopt.mutate.spans import Field
from kvopt.mutate.vocabulary import starts_imperative

ROLE = re.compile(r"(You are|You're|You’re|Act as|Take the role of|You act as|You play the role of) (?=(?:a|an|the) )")
ROLES = ("You are", "Act as", "Take the role of", "You act as", "You play the role of")
TASK = re.compile(
    r"(Your (?:task|job|goal|aim) is to|It is your (?:task|job) to|You are asked to|You are expected to|You are here to) (?=[a-z])"  # noqa: E501
)
TASKS = (
    "Your task is to",
    "Your job is to",
    "Your goal is to",
    "It is your task to",
    "It is your job to",
    "You are asked to",
)


@operator("role", "lexical")
def role(field: Field, rng: Random) -> str | None:
    """``You are a …`` ↔ ``Act as a …`` at the beginning of a sentence that says who the model is."""
    changes = []
    for start, end in units(field.text):
        if (match := ROLE.match(field.text[start:end])) and not re.search(r"\bwho you\b", field.text[start:end]):
            changes.append((start, start + match.end(), rng.choice([r for r in ROLES if r != match[1]]) + " "))
    return replace_spans(field.text, changes[:1]) if changes else None


@operator("task-phrase", "lexical")
def task_phrase(field: Field, rng: Random) -> str | None:
    """``Your task is to write …`` ↔ ``Your job is to write …`` ↔ ``Write …``."""
    changes = []
    for start, end in units(field.text):
        sentence = field.text[start:end]
        if match := TASK.match(sentence):
            options = [f"{way} " for way in TASKS if way != match[1]]
            bare = capitalize(sentence[match.end() :])
            if starts_imperative(bare) and rng.random() < 0.3:
                changes.append((start, end, bare))
            else:
                changes.append((start, start + match.end(), rng.choice(options)))
    if not changes:
        first = next(((s, e) for s, e in units(field.text) if starts_imperative(field.text[s:e])), None)
        if first is None or re.search("[;:?]", field.text[first[0] : first[1]]):
            return None
        sentence = field.text[first[0] : first[1]]
        changes.append((*first, f"{rng.choice(TASKS)} {sentence[:1].lower()}{sentence[1:]}"))
    return replace_spans(field.text, some(rng, changes))
