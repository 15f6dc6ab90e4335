"""Neighbouring instructions are joined by a semicolon or separated again."""

from __future__ import annotations

import re
from random import Random

from kvopt.mutate.blocks import blocks, capitalize, join, lower_first, sentences, some
from kvopt.mutate.operator import operator
from kvopt.mutate.spans import Field
from kvopt.mutate.vocabulary import starts_imperative

STARTS = re.compile(r"(Do not|Don't|Don’t|Never|Always|You|Please|The|Each|Every|If|When|All|Only) ")


@operator("semicolons", "syntax")
def semicolons(field: Field, rng: Random) -> str | None:
    """``Do A. Do B.`` → ``Do A; do B.`` for two short sentences."""
    text_blocks = blocks(field.text)
    sites = []
    for at, block in enumerate(text_blocks):
        if block.kind != "paragraph" or field.holds_slot(block.text):
            continue
        pairs = sentences(block.body)
        sites += [(at, i) for i in range(len(pairs) - 1) if _joinable(pairs[i], pairs[i + 1])]
    if not sites:
        return None
    at, i = rng.choice(sites)
    pairs = sentences(text_blocks[at].body)
    pairs[i : i + 2] = [(pairs[i][0][:-1] + "; " + lower_first(pairs[i + 1][0]), pairs[i + 1][1])]
    text_blocks[at] = text_blocks[at].with_body("".join(sentence + space for sentence, space in pairs))
    return join(text_blocks)


def _joinable(first: tuple[str, str], second: tuple[str, str]) -> bool:
    (a, space), (b, _) = first, second
    return (
        space == " "
        and a.endswith(".")
        and b.endswith(".")
        and not re.search("[;:—–]", a + b)
        and len(a.split()) + len(b.split()) <= 40
        and bool(STARTS.match(b) or starts_imperative(b))
    )


@operator("split-semicolons", "syntax")
def split_semicolons(field: Field, rng: Random) -> str | None:
    """``Do A; do B.`` → ``Do A. Do B.`` where what follows the semicolon can begin a sentence."""
    sites = [
        match
        for match in re.finditer(r"; (?=[a-z])", field.text)
        if STARTS.match(capitalize(field.text[match.end() :]))
        or starts_imperative(capitalize(field.text[match.end() :]))
    ]
    if not sites:
        return None
    text = field.text
    for match in reversed(some(rng, sites)):
        text = text[: match.start()] + ". " + capitalize(text[match.end() :])
    return text
