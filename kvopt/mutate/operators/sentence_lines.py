"""The space between sentences changes."""

from __future__ import annotations

from random import Random

from kvopt.mutate.blocks import blocks, join, sentences
from kvopt.mutate.operator import operator
from kvopt.mutate.spans import Field


@operator("sentence-spacing", "syntax")
def sentence_spacing(field: Field, rng: Random) -> str | None:
    """One or two spaces between sentences, or a line for each, in all paragraphs."""
    found = blocks(field.text)
    space = rng.choice([" ", "  ", field.newline])
    changed = False
    for i, block in enumerate(found):
        if block.kind == "paragraph" and len(parts := sentences(block.body)) > 1:
            found[i] = block.with_body("".join(s + (space if gap else "") for s, gap in parts))
            changed = True
    return join(found) if changed else None
