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
    found = blocks(field.text)
    stop = next((i for i, block in enumerate(found) if field.holds_slot(block.text)), len(found))
    while stop and found[stop - 1].kind == "blank":
        stop -= 1
    if sum(len(block.text.split()) for block in found[:stop]) < 12:
        return None
    head, rest = join(found[:stop]), join(found[stop:])
    tag = rng.choice(["instructions", "instructions", "task"])
    return f"<{tag}>{newline}{head.rstrip()}{newline}</{tag}>{head[len(head.rstrip()) :]}{rest}"
