"""Paragraphs are split at a sentence or joined."""

from __future__ import annotations

from random import Random

from kvopt.mutate.blocks import Block, blocks, join, sentences
from kvopt.mutate.operator import operator
from kvopt.mutate.spans import Field
from kvopt.mutate.vocabulary import STARTS_DEPENDENT


@operator("split-paragraph", "structure")
def split_paragraph(field: Field, rng: Random) -> str | None:
    """A blank line between two sentences, the second of which stands alone; or a line for each sentence."""
    found = blocks(field.text)
    sites = []
    for at, block in enumerate(found):
        if block.kind == "paragraph":
            parts = sentences(block.body)
            sites += [(at, i) for i in range(len(parts) - 1) if not STARTS_DEPENDENT.match(parts[i + 1][0])]
    if not sites:
        return None
    at, i = rng.choice(sites)
    parts = sentences(found[at].body)
    if rng.random() < 0.35:
        parts = [(sentence, field.newline if space else "") for sentence, space in parts]
    else:
        parts[i] = (parts[i][0], field.newline * 2)
    found[at] = found[at].with_body("".join(sentence + space for sentence, space in parts))
    return join(found)


@operator("join-paragraphs", "structure")
def join_paragraphs(field: Field, rng: Random) -> str | None:
    """Two paragraphs of whole sentences become one."""
    found = blocks(field.text)
    sites = [
        at
        for at in range(len(found) - 2)
        if [b.kind for b in found[at : at + 3]] == ["paragraph", "blank", "paragraph"]
        and found[at].body.rstrip()[-1:] in (".", "!")
        and found[at + 2].body.rstrip()[-1:] in (".", "!")
        and not field.holds_slot(found[at].text + found[at + 2].text)
    ]
    if not sites:
        return None
    at = rng.choice(sites)
    joined = Block("paragraph", found[at].body.rstrip() + " " + found[at + 2].text.lstrip(" \t"))
    return join([*found[:at], joined, *found[at + 3 :]])
