"""Headings are added, dropped or named otherwise."""

from __future__ import annotations

from random import Random

from kvopt.mutate.blocks import Block, blocks, capitalize, heading_of, items, join
from kvopt.mutate.operator import operator
from kvopt.mutate.spans import Field
from kvopt.mutate.vocabulary import HEADINGS, starts_imperative

LIST_HEADINGS = ("Rules", "Guidelines", "Instructions", "Requirements")
TEXT_HEADINGS = ("Task", "Instructions", "Your task")
SHAPES = ("{}:", "## {}", "# {}", "**{}**", "**{}:**", "### {}")


@operator("add-heading", "structure")
def add_heading(field: Field, rng: Random) -> str | None:
    """A heading in front of a list of instructions without a lead-in, or in front of the field's first paragraph."""
    text_blocks = blocks(field.text)
    newline = field.newline
    sites: list[tuple[int, tuple[str, ...]]] = []
    for at, block in enumerate(text_blocks):
        before = next((b for b in reversed(text_blocks[:at]) if b.kind != "blank"), None)
        led = before is not None and (before.kind == "heading" or before.body.rstrip().endswith(":"))
        if block.kind == "list" and not led and len(items(block)) > 1 and starts_imperative(items(block)[0].body):
            sites.append((at, LIST_HEADINGS))
        if block.kind == "paragraph" and at == 0 and len(block.body.split()) > 8 and not field.holds_slot(block.body):
            sites.append((at, TEXT_HEADINGS))
    taken = {heading.name.lower() for block in text_blocks if (heading := heading_of(block.body))}
    if not sites:
        return None
    at, names = rng.choice(sites)
    names = tuple(name for name in names if name.lower() not in taken)
    if not names:
        return None
    shape = rng.choice(SHAPES)
    new_blocks = [Block("heading", shape.format(rng.choice(names)) + newline)]
    if at and text_blocks[at - 1].kind != "blank":
        new_blocks.insert(0, Block("blank", newline))
    if "#" in shape and rng.random() < 0.5:
        new_blocks.append(Block("blank", newline))
    return join([*text_blocks[:at], *new_blocks, *text_blocks[at:]])


@operator("drop-heading", "structure")
def drop_heading(field: Field, rng: Random) -> str | None:
    """A heading that only says "Rules", "Task" and the like goes, with the blank line after it."""
    text_blocks = blocks(field.text)
    general = {"rules", "guidelines", "instructions", "task", "your task", "requirements", "role", "your role", "steps"}
    sites = [
        i
        for i, block in enumerate(text_blocks[:-1])
        if block.kind == "heading" and (h := heading_of(block.body)) and h.name.lower().strip() in general
    ]
    if not sites:
        return None
    at = rng.choice(sites)
    stop = at + 1
    while stop < len(text_blocks) - 1 and text_blocks[stop].kind == "blank":
        stop += 1
    return join([*text_blocks[:at], *text_blocks[stop:]])


@operator("rename-heading", "structure")
def rename_heading(field: Field, rng: Random) -> str | None:
    """A section label gets another name of the same meaning, unless the text refers to it."""
    text_blocks = blocks(field.text)
    sites = []
    for i, block in enumerate(text_blocks):
        heading = heading_of(block.body) if block.kind == "heading" else None
        if heading and HEADINGS.others(heading.name.lower()):
            elsewhere = join([*text_blocks[:i], *text_blocks[i + 1 :]]).lower()
            if f"the {heading.name.lower()}" not in elsewhere and f"these {heading.name.lower()}" not in elsewhere:
                sites.append((i, heading))
    if not sites:
        return None
    at, heading = rng.choice(sites)
    name = capitalize(rng.choice(HEADINGS.others(heading.name.lower())))
    name = name.upper() if heading.name.isupper() else name
    text_blocks[at] = text_blocks[at].with_body(heading.open + name + heading.close)
    return join(text_blocks)
