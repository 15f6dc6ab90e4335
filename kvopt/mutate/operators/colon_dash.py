"""The mark between a label and its explanation changes."""

from __future__ import annotations

import re
from dataclasses import replace
from random import Random

from kvopt.mutate.blocks import blocks, items, join, list_block
from kvopt.mutate.operator import operator
from kvopt.mutate.spans import MARK, Field

LABEL = re.compile(rf"((?:\*\*)?(?:{MARK}|[A-Za-z]+(?: [A-Za-z]+){{0,2}})(?:\*\*)?)(: | - | – | — | = )(?=\S)")
MARKS = (": ", " - ", " – ", " — ")


@operator("colon-dash", "syntax")
def colon_dash(field: Field, rng: Random) -> str | None:
    """``label: text`` ↔ ``label - text`` ↔ ``label — text`` in all items of a list that are made so."""
    text_blocks = blocks(field.text)
    sites = []
    for i, block in enumerate(text_blocks):
        if block.kind == "list" and len(items(block)) > 1:
            matches = [LABEL.match(item.body) for item in items(block)]
            if all(matches) and not field.holds_slot(block.text):
                sites.append(i)
    if not sites:
        return None
    at = rng.choice(sites)
    list_items = items(text_blocks[at])
    first = LABEL.match(list_items[0].body)
    mark = rng.choice([m for m in MARKS if first and m != first[2]])
    text_blocks[at] = list_block(
        [replace(item, body=LABEL.sub(lambda m: m[1] + mark, item.body, count=1)) for item in list_items]
    )
    return join(text_blocks)


@operator("dashes", "syntax")
def dashes(field: Field, rng: Random) -> str | None:
    """`` – `` ↔ `` — `` ↔ `` - `` inside sentences."""
    present = re.findall(r"(?<=[\w.)]) [-–—] (?=\S)", field.text)
    if not present:
        return None
    mark = rng.choice([m for m in (" - ", " – ", " — ") if m != present[0]])
    return re.sub(r"(?<=[\w.)]) [-–—] (?=\S)", mark, field.text)
