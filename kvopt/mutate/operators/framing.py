"""A sentence that only asks for care comes or goes."""

from __future__ import annotations

from random import Random

from kvopt.mutate.blocks import blocks, join, sentences, units
from kvopt.mutate.operator import operator
from kvopt.mutate.spans import Field

FRAMES = (
    "Follow these instructions carefully.",
    "Read the instructions below carefully.",
    "Please follow the instructions closely.",
    "Work carefully.",
    "Take care to follow every instruction.",
    "Here is what you have to do.",
    "Keep to the instructions.",
)


@operator("framing", "lexical")
def framing(field: Field, rng: Random) -> str | None:
    """A sentence such as "Follow these instructions carefully." in front of the field or after its introduction;
    dropped when there is one.
    """
    text_blocks = blocks(field.text)
    for i, block in enumerate(text_blocks):
        if block.kind == "paragraph":
            pairs = sentences(block.body)
            kept = [(s, gap) for s, gap in pairs if s not in FRAMES]
            if 0 < len(kept) < len(pairs):
                text_blocks[i] = block.with_body("".join(s + gap for s, gap in kept).rstrip(" "))
                return join(text_blocks)
    if (
        sum(1 for _ in units(field.text)) < 4
        or not text_blocks
        or text_blocks[0].kind != "paragraph"
        or text_blocks[0].text.startswith("<")
        or field.holds_slot(text_blocks[0].text)
    ):
        return None
    frame, pairs = rng.choice(FRAMES), sentences(text_blocks[0].body)
    after = 1 if pairs[0][0].startswith(("You are", "You're", "Act as")) and pairs[0][0].endswith(".") else 0
    if after and len(pairs) == 1:
        pairs[0] = (pairs[0][0], " ")
    pairs.insert(after, (frame, " " if after < len(pairs) else ""))
    text_blocks[0] = text_blocks[0].with_body("".join(s + gap for s, gap in pairs))
    return join(text_blocks)
