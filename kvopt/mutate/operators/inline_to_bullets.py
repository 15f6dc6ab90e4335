"""An inline list of labels becomes bullets, and bullets of labels an inline list."""

from __future__ import annotations

import re
from random import Random

from kvopt.mutate.blocks import Block, blocks, items, join
from kvopt.mutate.operator import operator
from kvopt.mutate.spans import MARK, Field

INLINE = re.compile(rf":[ \t]+({MARK}(?:, {MARK})+,? (?:(?:and|or) )?{MARK})\.?(?=[ \t]*(?:\r?\n|$)|[ \t]+\S)")
BARE = re.compile(rf"{MARK}$")


@operator("inline-to-bullets", "structure")
def inline_to_bullets(field: Field, rng: Random) -> str | None:
    """``one of: A, B, C.`` → one bullet for each label, what follows in a new paragraph."""
    sites = [m for m in INLINE.finditer(field.text) if not field.holds_slot(m[0])]
    if not sites:
        return None
    site, newline = rng.choice(sites), field.newline
    bullet = rng.choice(["- ", "* ", "• "])
    listed = "".join(newline + bullet + mark for mark in re.findall(MARK, site[1]))
    following = field.text[site.end() :]
    stripped = following.lstrip(" \t")
    gap = newline * 2 if stripped and not stripped.startswith(("\r", "\n")) else ""
    return field.text[: site.start()] + ":" + listed + gap + (stripped if gap else following)


@operator("bullets-to-inline", "structure")
def bullets_to_inline(field: Field, rng: Random) -> str | None:
    """Bullets that are bare labels → one line of labels after their lead-in."""
    text_blocks = blocks(field.text)
    for at in range(1, len(text_blocks)):
        lead, block = text_blocks[at - 1], text_blocks[at]
        if (
            block.kind != "list"
            or not lead.body.rstrip().endswith(":")
            or lead.kind == "blank"
            or field.holds_slot(block.text)
        ):
            continue
        list_items = items(block)
        if len(list_items) > 1 and all(BARE.match(item.body) for item in list_items) and lead.kind == "paragraph":
            text_blocks[at - 1] = Block("paragraph", lead.body.rstrip() + " ")
            period = rng.choice([".", ""])
            text_blocks[at] = Block(
                "paragraph", ", ".join(item.body for item in list_items) + period + list_items[-1].end
            )
            return join(text_blocks)
    return None
