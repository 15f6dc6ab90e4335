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
    text_blocks = blocks(field.text)
    sites = []
    for at, block in enumerate(text_blocks):
        if block.kind == "paragraph":
            pairs = sentences(block.body)
            sites += [(at, i) for i in range(len(pairs) - 1) if not STARTS_DEPENDENT.match(pairs[i + 1][0])]
    if not sites:
        return None
    at, i = rng.choice(sites)
    pairs = sentences(text_blocks[at].body)
    if rng.random() < 0.35:
        pairs = [(sentence, field.newline if space else "") for sentence, space in pairs]
    else:
        pairs[i] = (pairs[i][0], field.newline * 2)
    text_blocks[at] = text_blocks[at].with_body("".join(sentence + space for sentence, space in pairs))
    return join(text_blocks)


@operator("join-paragraphs", "structure")
def join_paragraphs(field: Field, rng: Random) -> str | None:
    """Two paragraphs of whole sentences become one."""
    text_blocks = blocks(field.text)
    sites = [
        at
        for at in range(len(text_blocks) - 2)
        if [b.kind for b in text_blocks[at : at + 3]] == ["paragraph", "blank", "paragraph"]
        and text_blocks[at].body.rstrip()[-1:] in (".", "!")
        and text_blocks[at + 2].body.rstrip()[-1:] in (".", "!")
        and not field.holds_slot(text_blocks[at].text + text_blocks[at + 2].text)
    ]
    if not sites:
        return None
    at = rng.choice(sites)
    joined = Block("paragraph", text_blocks[at].body.rstrip() + " " + text_blocks[at + 2].text.lstrip(" \t"))
    return join([*text_blocks[:at], joined, *text_blocks[at + 3 :]])
