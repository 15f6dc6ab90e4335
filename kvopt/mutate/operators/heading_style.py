"""Headings are decorated otherwise."""

from __future__ import annotations

from random import Random

from kvopt.mutate.blocks import blocks, capitalize, heading_of, join
from kvopt.mutate.operator import operator
from kvopt.mutate.spans import MARK, Field
from kvopt.mutate.vocabulary import HEADINGS

SHAPES = ("{}:", "## {}", "# {}", "### {}", "**{}**", "**{}:**")


@operator("heading-style", "syntax")
def heading_style(field: Field, rng: Random) -> str | None:
    """``Rules:`` ↔ ``## Rules`` ↔ ``**Rules**``, for all headings of the field."""
    text_blocks = blocks(field.text)
    shape = rng.choice(SHAPES)
    changed = False
    for i, block in enumerate(text_blocks):
        heading = heading_of(block.body) if block.kind == "heading" else None
        if heading and not field.holds_slot(block.body):
            text_blocks[i] = block.with_body(shape.format(heading.name.strip()))
            changed = True
    return join(text_blocks) if changed else None


@operator("heading-case", "syntax")
def heading_case(field: Field, rng: Random) -> str | None:
    """Headings in capitals, in title case or in sentence case."""
    text_blocks = blocks(field.text)
    case = rng.choice(["upper", "title", "sentence", "lower"])
    changed = False
    for i, block in enumerate(text_blocks):
        heading = heading_of(block.body) if block.kind == "heading" else None
        if heading and heading.name.lower() in HEADINGS.names and not any(ord(c) >= ord(MARK[1]) for c in heading.name):
            text_blocks[i] = block.with_body(heading.open + _cased(heading.name, case) + heading.close)
            changed = True
    return join(text_blocks) if changed else None


def _cased(name: str, case: str) -> str:
    lower = name.lower()
    if case == "title":
        return " ".join(w if w in {"of", "the", "to"} and i else capitalize(w) for i, w in enumerate(lower.split(" ")))
    return {"upper": name.upper(), "sentence": capitalize(lower), "lower": lower}[case]
