"""Separator lines between sections come, go or change."""

from __future__ import annotations

from random import Random

from kvopt.mutate.blocks import Block, blocks, join
from kvopt.mutate.operator import operator
from kvopt.mutate.spans import Field

LINES = ("---", "***", "===", "-----", "* * *", "##########", "~~~~~")[:5]


@operator("separators", "syntax")
def separators(field: Field, rng: Random) -> str | None:
    """``---`` between two blocks, another one, or none; never one that would make a heading of the line above it."""
    found = blocks(field.text)
    newline = field.newline
    lines = [i for i, block in enumerate(found) if block.kind == "rule"]
    if lines:
        at = rng.choice(lines)
        around = found[at - 1].kind if at else "", found[at + 1].kind if at + 1 < len(found) else ""
        if rng.random() < 0.4 and "blank" in around:
            del found[at]
        else:
            line = rng.choice([one for one in LINES if one != found[at].body.strip()])
            found[at] = found[at].with_body(line)
        return join(found)
    sites = [
        i
        for i in range(1, len(found) - 1)
        if found[i].kind == "blank" and found[i].end and found[i - 1].kind != "blank" and found[i - 1].kind != "heading"
    ]
    if not sites:
        return None
    at = rng.choice(sites)
    found.insert(at + 1, Block("rule", rng.choice(LINES) + newline))
    if found[at + 2].kind != "blank":
        found.insert(at + 2, Block("blank", newline))
    return join(found)
