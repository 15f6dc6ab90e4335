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
    found = blocks(field.text)
    newline = field.newline
    sites = []
    for i in range(1, len(found) - 1):
        around = (found[i - 1].kind, found[i + 1].kind)
        if found[i].kind == "blank" and found[i].text.endswith("\n"):
            sites.append((i, "add"))
            if "blank" in around or ("paragraph" in around and "list" in around) or "heading" in around:
                sites.append((i, "drop"))
    for i in range(1, len(found)):
        if (found[i - 1].kind, found[i].kind) in {("paragraph", "list"), ("heading", "list"), ("heading", "paragraph")}:
            sites.append((i, "add"))
    if not sites:
        return None
    i, what = rng.choice(sites)
    if what == "drop":
        del found[i]
    else:
        found.insert(i, Block("blank", newline))
    return join(found)


@operator("loose-lists", "syntax")
def loose_lists(field: Field, rng: Random) -> str | None:
    """Blank lines between the items of a list, or none."""
    found = blocks(field.text)
    lists = [i for i, block in enumerate(found) if block.kind == "list" and len(items(block)) > 1]
    if not lists:
        return None
    at, newline = rng.choice(lists), field.newline
    parts = items(found[at])
    gap = newline if parts[0].end.count("\n") > 1 else newline * 2
    found[at] = list_block([replace(item, end=gap) for item in parts[:-1]] + [parts[-1]])
    return join(found)
