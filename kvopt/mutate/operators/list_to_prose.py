"""A list of instructions becomes a paragraph."""

from __future__ import annotations

import re
from random import Random

from kvopt.mutate.blocks import Block, ListItem, blocks, capitalize, items, join, lower_first
from kvopt.mutate.operator import operator
from kvopt.mutate.spans import Field
from kvopt.mutate.vocabulary import REFERS_TO_NUMBER, starts_imperative


@operator("list-to-prose", "structure")
def list_to_prose(field: Field, rng: Random) -> str | None:
    """Items become sentences of one paragraph, or parts of one sentence joined by semicolons."""
    text_blocks = blocks(field.text)
    refers = REFERS_TO_NUMBER.search(field.text)
    lists = [i for i, block in enumerate(text_blocks) if block.kind == "list" and _can_flow(items(block), field)]
    lists = [i for i in lists if not (refers and items(text_blocks[i])[0].numbered)]
    if not lists:
        return None
    at = rng.choice(lists)
    list_items = items(text_blocks[at])
    lead = text_blocks[at - 1] if at and text_blocks[at - 1].kind == "paragraph" else None
    end = list_items[-1].end
    if all(_is_sentence(item.body) for item in list_items):
        prose = " ".join(
            capitalize(item.body if field.ends_sentence(item.body) else item.body + ".") for item in list_items
        )
        text_blocks[at] = Block("paragraph", prose + end)
    elif lead and lead.body.rstrip().endswith(":"):
        bodies = [item.body.rstrip(".;,") for item in list_items]
        mark = "; " if any("," in body for body in bodies) else ", "
        text_blocks[at] = Block("paragraph", mark.join(bodies[:-1]) + f"{mark}and {bodies[-1]}." + end)
    else:
        return None
    if lead and lead.body.rstrip().endswith(":"):
        text_blocks[at - 1] = Block("paragraph", lead.body.rstrip() + " ")
    return join(text_blocks)


def _can_flow(list_items: list[ListItem], field: Field) -> bool:
    return len(list_items) > 1 and not any(
        "\n" in item.body or field.holds_slot(item.body) or not item.body for item in list_items
    )


def _is_sentence(body: str) -> bool:
    plain = re.sub(r"^(please|always|never|do not|don't|only|simply|just) ", "", lower_first(body), flags=re.I)
    return len(body.split()) >= 3 and (body[-1] in ".!?" or starts_imperative(plain))
