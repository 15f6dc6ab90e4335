"""Independent list items change places."""

from __future__ import annotations

import re
from dataclasses import replace
from random import Random

from kvopt.mutate.blocks import Block, blocks, heading_of, items, join, list_block
from kvopt.mutate.operator import operator
from kvopt.mutate.spans import Field
from kvopt.mutate.vocabulary import ANAPHORA, REFERS_TO_NUMBER

RULES = re.compile(r"\b(rules?|guidelines?|requirements?|conventions?|notes?|constraints?|remarks?)\b", re.I)


@operator("reorder-items", "structure")
def reorder_items(field: Field, rng: Random) -> str | None:
    """Items of a list are shuffled, rotated or reversed; not where one points to another, nor numbered steps."""
    if REFERS_TO_NUMBER.search(field.text):
        return None
    text_blocks = blocks(field.text)
    sites = [
        i for i, block in enumerate(text_blocks) if block.kind == "list" and _independent(block, text_blocks[:i], field)
    ]
    if not sites:
        return None
    at = rng.choice(sites)
    list_items = items(text_blocks[at])
    bodies = [item.body for item in list_items]
    turn = rng.choice(["shuffle", "shuffle", "reverse", "swap"])
    if turn == "shuffle":
        rng.shuffle(bodies)
    elif turn == "reverse":
        bodies.reverse()
    else:
        i, j = rng.sample(range(len(bodies)), 2)
        bodies[i], bodies[j] = bodies[j], bodies[i]
    if not _same_ending(bodies):
        return None
    text_blocks[at] = list_block([replace(item, body=body) for item, body in zip(list_items, bodies, strict=True)])
    return join(text_blocks)


def _independent(block: Block, before: list[Block], field: Field) -> bool:
    list_items = items(block)
    if len(list_items) < 2 or any(field.holds_slot(item.body) or ANAPHORA.search(item.body) for item in list_items):
        return False
    if not _same_ending([item.body for item in list_items]):
        return False
    lead = next((b for b in reversed(before) if b.kind != "blank"), None)
    introduced = lead is not None and (heading_of(lead.body) or lead.kind == "paragraph") and RULES.search(lead.body)
    return not list_items[0].numbered or bool(introduced)


def _same_ending(bodies: list[str]) -> bool:
    """Whether the items all end alike, so that a final "." or ", and" does not land in the middle."""
    return len({body[-1] if body[-1] in ".;,:!?" else "" for body in bodies}) == 1 and not any(
        re.search(r"\b(and|or)$", body) for body in bodies
    )
