"""List items gain or lose their final period."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from kvopt.mutate.blocks import ListItem, blocks, items, join, list_block, sentences
from kvopt.mutate.operator import operator
from kvopt.mutate.spans import Field


@operator("final-periods", "syntax")
def final_periods(field: Field, rng: Random) -> str | None:
    """``- item.`` ↔ ``- item`` ↔ ``- item;`` for all items of a list of single sentences."""
    text_blocks = blocks(field.text)
    lists = [i for i, block in enumerate(text_blocks) if block.kind == "list" and _simple(items(block), field)]
    if not lists:
        return None
    at = rng.choice(lists)
    list_items = items(text_blocks[at])
    present = list_items[0].body[-1] if list_items[0].body[-1] in ".;" else ""
    mark = rng.choice([m for m in ("", ".", ";") if m != present])
    ends = [mark] * (len(list_items) - 1) + ["." if mark == ";" else mark]
    punctuated = [replace(item, body=item.body.rstrip(".;") + end) for item, end in zip(list_items, ends, strict=True)]
    text_blocks[at] = list_block(punctuated)
    return join(text_blocks)


def _simple(list_items: list[ListItem], field: Field) -> bool:
    return all(
        len(item.body.split()) > 1
        and len(sentences(item.body)) == 1
        and (item.body[-1] in ".;" or not field.ends_sentence(item.body))
        and item.body[-1] not in "!?:,…"
        and not item.body.endswith(("..", "etc."))
        and not field.holds_slot(item.body)
        for item in list_items
    )
