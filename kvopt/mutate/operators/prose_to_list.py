"""A paragraph of instructions becomes a list."""

from __future__ import annotations

from random import Random

from kvopt.mutate.blocks import Block, ListItem, blocks, join, list_block, number_marker, sentences
from kvopt.mutate.operator import operator
from kvopt.mutate.spans import Field
from kvopt.mutate.vocabulary import STARTS_DEPENDENT


@operator("prose-to-list", "structure")
def prose_to_list(field: Field, rng: Random) -> str | None:
    """Sentences of a paragraph become items, in the same order; "You are …" may stay in front as the introduction."""
    text_blocks = blocks(field.text)
    newline = field.newline
    sites = []
    for at, block in enumerate(text_blocks):
        if block.kind != "paragraph" or field.holds_slot(block.text) or block.body.rstrip().endswith(":"):
            continue
        texts = [sentence for sentence, _ in sentences(block.body)]
        first = 1 if texts and texts[0].startswith(("You are", "You're", "Act as", "Your ")) else rng.choice([0, 0, 1])
        tail = texts[first:]
        if len(tail) >= 2 and not any(STARTS_DEPENDENT.match(s) or "\n" in s or s.endswith(":") for s in tail):
            sites.append((at, texts[:first], tail))
    if not sites:
        return None
    at, intro, tail = rng.choice(sites)
    style = rng.choice(["-", "-", "*", "•", "1.", "1)"])
    markers = [number_marker(style, i) if "1" in style else style for i in range(len(tail))]
    new_list = list_block([ListItem("", m, " ", s.rstrip(), newline) for m, s in zip(markers, tail, strict=True)])
    head = [Block("paragraph", " ".join(intro) + newline), Block("blank", newline)] if intro else []
    before = [Block("blank", newline)] if at and text_blocks[at - 1].kind == "paragraph" else []
    end = text_blocks[at].end
    new_list = Block("list", new_list.text[: len(new_list.text) - len(newline)] + end)
    after = (
        [Block("blank", newline)] if end and at + 1 < len(text_blocks) and text_blocks[at + 1].kind != "blank" else []
    )
    return join([*text_blocks[:at], *before, *head, new_list, *after, *text_blocks[at + 1 :]])
