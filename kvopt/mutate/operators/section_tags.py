"""Instructions are put between tags."""

from __future__ import annotations

from random import Random

from kvopt.mutate.blocks import blocks, join
from kvopt.mutate.operator import operator
from kvopt.mutate.spans import Field


@operator("section-tags", "structure")
def section_tags(field: Field, rng: Random) -> str | None:
    """``<instructions>`` around all that stands before the first slot's paragraph, or the tags that an earlier step put
    there are dropped.
    """
    newline = field.newline
    for tag in ("instructions", "rules", "guidelines", "task"):
        if f"<{tag}>" in field.text or f"</{tag}>" in field.text:
            return None
    text_blocks = blocks(field.text)
    stop = next((i for i, block in enumerate(text_blocks) if field.holds_slot(block.text)), len(text_blocks))
    while stop and text_blocks[stop - 1].kind == "blank":
        stop -= 1
    if sum(len(block.text.split()) for block in text_blocks[:stop]) < 12:
        return None
    head, tail = join(text_blocks[:stop]), join(text_blocks[stop:])
    tag = rng.choice(["instructions", "instructions", "task"])
    return f"<{tag}>{newline}{head.rstrip()}{newline}</{tag}>{head[len(head.rstrip()) :]}{tail}"
