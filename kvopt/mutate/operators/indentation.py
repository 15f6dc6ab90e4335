"""List items are set in or out."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from kvopt.mutate.blocks import blocks, items, join, list_block
from kvopt.mutate.operator import operator
from kvopt.mutate.spans import Field


@operator("indentation", "syntax")
def indentation(field: Field, rng: Random) -> str | None:
    """Every list of one-line items moves by two spaces."""
    text_blocks = blocks(field.text)
    lists = [
        i for i, b in enumerate(text_blocks) if b.kind == "list" and all("\n" not in item.body for item in items(b))
    ]
    if not lists:
        return None
    width = rng.choice([w for w in ("", "  ", " ") if w != items(text_blocks[lists[0]])[0].indent])
    for i in lists:
        text_blocks[i] = list_block([replace(item, indent=width) for item in items(text_blocks[i])])
    return join(text_blocks)
