"""Blank lines between blocks and list items come or go."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from kvopt.mutate.blocks import Block, blocks, items, join, list_block
from kvopt.mutate.operator import operator
from kvopt.mutate.spans import Field


@operator("blank-lines", "syntax")
def blank_lines(field: Field, rng: Random) -> str | None:
    """One more or one fewer blank line between two blocks, where both stay two blocks."""
    text_blocks = blocks(field.text)
    newline = field.newline
    sites = []
    for i in range(1, len(text_blocks) - 1):
        around = (text_blocks[i - 1].kind, text_blocks[i + 1].kind)
        if text_blocks[i].kind == "blank" and text_blocks[i].text.endswith("\n"):
            sites.append((i, "add"))
            if "blank" in around or ("paragraph" in around and "list" in around) or "heading" in around:
                sites.append((i, "drop"))
    for i in range(1, len(text_blocks)):
        if (text_blocks[i - 1].kind, text_blocks[i].kind) in {
            ("paragraph", "list"),
            ("heading", "list"),
            ("heading", "paragraph"),
        }:
            sites.append((i, "add"))
    if not sites:
        return None
    i, what = rng.choice(sites)
    if what == "drop":
        del text_blocks[i]
    else:
        text_blocks.insert(i, Block("blank", newline))
    return join(text_blocks)


@operator("loose-lists", "syntax")
def loose_lists(field: Field, rng: Random) -> str | None:
    """Blank lines between the items of a list, or none."""
    text_blocks = blocks(field.text)
    lists = [i for i, block in enumerate(text_blocks) if block.kind == "list" and len(items(block)) > 1]
    if not lists:
        return None
    at, newline = rng.choice(lists), field.newline
    list_items = items(text_blocks[at])
    gap = newline if list_items[0].end.count("\n") > 1 else newline * 2
    text_blocks[at] = list_block([replace(item, end=gap) for item in list_items[:-1]] + [list_items[-1]])
    return join(text_blocks)
