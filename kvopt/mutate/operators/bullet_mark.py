"""Another mark in front of list items."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from kvopt.mutate.blocks import blocks, items, join, list_block
from kvopt.mutate.operator import operator
from kvopt.mutate.spans import Field


@operator("bullet-mark", "syntax")
def bullet_mark(field: Field, rng: Random) -> str | None:
    """``-`` ↔ ``*`` ↔ ``•`` ↔ ``+`` in every bulleted list."""
    text_blocks = blocks(field.text)
    lists = [i for i, block in enumerate(text_blocks) if block.kind == "list" and not items(block)[0].numbered]
    if not lists:
        return None
    mark = rng.choice([m for m in "-*•+–" if m != items(text_blocks[lists[0]])[0].marker])
    for i in lists:
        text_blocks[i] = list_block([replace(item, marker=mark) for item in items(text_blocks[i])])
    return join(text_blocks)
