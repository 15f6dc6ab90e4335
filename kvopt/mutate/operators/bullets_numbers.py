"""Bulleted lists become numbered ones and the other way round."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from kvopt.mutate.blocks import Block, blocks, items, join, list_block, renumber, some
from kvopt.mutate.operator import operator
from kvopt.mutate.spans import Field
from kvopt.mutate.vocabulary import REFERS_TO_NUMBER


@operator("bullets-numbers", "structure")
def bullets_numbers(field: Field, rng: Random) -> str | None:
    """``- item`` ↔ ``1. item``; numbers stay where the text refers to them."""
    text_blocks = blocks(field.text)
    lists = [i for i, block in enumerate(text_blocks) if block.kind == "list" and len(items(block)) > 1]
    if REFERS_TO_NUMBER.search(field.text):
        lists = [i for i in lists if not items(text_blocks[i])[0].numbered]
    style, bullet = rng.choice(["1.", "1.", "1)", "(1)"]), rng.choice("-*•")
    for i in some(rng, lists):
        text_blocks[i] = _switched(text_blocks[i], style, bullet)
    return join(text_blocks) if lists else None


def _switched(block: Block, style: str, bullet: str) -> Block:
    list_items = items(block)
    if list_items[0].numbered:
        return list_block([replace(item, marker=bullet) for item in list_items])
    return list_block(renumber(list_items, style))
