"""Independent neighbouring sentences change places."""

from __future__ import annotations

import re
from random import Random

from kvopt.mutate.blocks import blocks, join, sentences
from kvopt.mutate.operator import operator
from kvopt.mutate.spans import Field
from kvopt.mutate.vocabulary import ANAPHORA, starts_imperative

PREFIX = re.compile(r"^(please |always |never |do not |don't |only |you must |you should )", re.I)
DEFINITE = re.compile(r"\b(?:the|that|each|every) ([a-z]+)")
INDEFINITE = re.compile(r"\b(?:a|an|one|single|two) (?:[a-z-]+ )?([a-z]+)")


@operator("reorder-sentences", "structure")
def reorder_sentences(field: Field, rng: Random) -> str | None:
    """Two neighbouring instructions swap, when neither points to anything that the other one introduces."""
    text_blocks = blocks(field.text)
    sites = []
    for at, block in enumerate(text_blocks):
        if block.kind == "paragraph" and not field.holds_slot(block.text):
            pairs = sentences(block.body)
            sites += [(at, i) for i in range(len(pairs) - 1) if _swappable(pairs[i][0], pairs[i + 1][0])]
    if not sites:
        return None
    at, i = rng.choice(sites)
    pairs = sentences(text_blocks[at].body)
    pairs[i], pairs[i + 1] = (pairs[i + 1][0], pairs[i][1]), (pairs[i][0], pairs[i + 1][1])
    text_blocks[at] = text_blocks[at].with_body("".join(sentence + space for sentence, space in pairs))
    return join(text_blocks)


def _swappable(first: str, second: str) -> bool:
    return _alone(first) and _alone(second) and not set(INDEFINITE.findall(first)) & set(DEFINITE.findall(second))


def _alone(sentence: str) -> bool:
    plain = PREFIX.sub("", sentence)
    return (
        sentence.rstrip()[-1:] in ".!"
        and not ANAPHORA.search(sentence)
        and starts_imperative(plain[:1].upper() + plain[1:])
    )
