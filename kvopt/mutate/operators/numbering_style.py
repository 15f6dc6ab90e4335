"""Another style of numbering."""

from __future__ import annotations

from random import Random

from kvopt.mutate.blocks import blocks, items, join, list_block, renumber
from kvopt.mutate.operator import operator
from kvopt.mutate.spans import Field
from kvopt.mutate.vocabulary import REFERS_TO_NUMBER

STYLES = ("1.", "1)", "(1)", "a.", "a)", "(a)")


@operator("numbering-style", "structure")
def numbering_style(field: Field, rng: Random) -> str | None:
    """``1.`` ↔ ``1)`` ↔ ``(1)`` ↔ ``a.`` in every numbered list of up to 26 items; letters only where no number is
    referred to.
    """
    text_blocks = blocks(field.text)
    changed = False
    style = rng.choice(STYLES[:3] if REFERS_TO_NUMBER.search(field.text) else STYLES)
    for i, block in enumerate(text_blocks):
        if block.kind == "list" and items(block)[0].numbered and 1 < len(items(block)) <= 26:
            text_blocks[i] = list_block(renumber(items(block), style))
            changed = True
    return join(text_blocks) if changed else None
