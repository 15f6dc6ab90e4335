"""The space between sentences changes."""

from __future__ import annotations

from random import Random

from kvopt.mutate.blocks import blocks, join, sentences
from kvopt.mutate.operator import operator
from kvopt.mutate.spans import Field


@operator("sentence-spacing", "syntax")
def sentence_spacing(field: Field, rng: Random) -> str | None:
    """One or two spaces between sentences, or a line for each, in all paragraphs."""
    text_blocks = blocks(field.text)
    space = rng.choice([" ", "  ", field.newline])
    changed = False
    for i, block in enumerate(text_blocks):
        if block.kind == "paragraph" and len(pairs := sentences(block.body)) > 1:
            text_blocks[i] = block.with_body("".join(s + (space if gap else "") for s, gap in pairs))
            changed = True
    return join(text_blocks) if changed else None
