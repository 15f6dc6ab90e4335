"""Separator lines between sections come, go or change."""

from __future__ import annotations

from random import Random

from kvopt.mutate.blocks import Block, blocks, join
from kvopt.mutate.operator import operator
from kvopt.mutate.spans import Field

LINES = ("---", "***", "===", "-----", "* * *", "##########", "~~~~~")[:5]


@operator("separators", "syntax")
def separators(field: Field, rng: Random) -> str | None:
    """``---`` between two blocks, another one, or none; never one that would make a heading of the line above it."""
    text_blocks = blocks(field.text)
    newline = field.newline
    lines = [i for i, block in enumerate(text_blocks) if block.kind == "rule"]
    if lines:
        at = rng.choice(lines)
        around = text_blocks[at - 1].kind if at else "", text_blocks[at + 1].kind if at + 1 < len(text_blocks) else ""
        if rng.random() < 0.4 and "blank" in around:
            del text_blocks[at]
        else:
            line = rng.choice([candidate for candidate in LINES if candidate != text_blocks[at].body.strip()])
            text_blocks[at] = text_blocks[at].with_body(line)
        return join(text_blocks)
    sites = [
        i
        for i in range(1, len(text_blocks) - 1)
        if text_blocks[i].kind == "blank"
        and text_blocks[i].end
        and text_blocks[i - 1].kind != "blank"
        and text_blocks[i - 1].kind != "heading"
    ]
    if not sites:
        return None
    at = rng.choice(sites)
    text_blocks.insert(at + 1, Block("rule", rng.choice(LINES) + newline))
    if text_blocks[at + 2].kind != "blank":
        text_blocks.insert(at + 2, Block("blank", newline))
    return join(text_blocks)
