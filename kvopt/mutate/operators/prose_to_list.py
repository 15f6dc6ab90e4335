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
    found = blocks(field.text)
    newline = field.newline
    sites = []
    for at, block in enumerate(found):
        if block.kind != "paragraph" or field.holds_slot(block.text) or block.body.rstrip().endswith(":"):
            continue
        parts = [sentence for sentence, _ in sentences(block.body)]
        first = 1 if parts and parts[0].startswith(("You are", "You're", "Act as", "Your ")) else rng.choice([0, 0, 1])
        tail = parts[first:]
        if len(tail) >= 2 and not any(STARTS_DEPENDENT.match(s) or "\n" in s or s.endswith(":") for s in tail):
            sites.append((at, parts[:first], tail))
    if not sites:
        return None
    at, intro, tail = rng.choice(sites)
    style = rng.choice(["-", "-", "*", "•", "1.", "1)"])
    markers = [number_marker(style, i) if "1" in style else style for i in range(len(tail))]
    made = list_block([ListItem("", m, " ", s.rstrip(), newline) for m, s in zip(markers, tail, strict=True)])
    head = [Block("paragraph", " ".join(intro) + newline), Block("blank", newline)] if intro else []
    before = [Block("blank", newline)] if at and found[at - 1].kind == "paragraph" else []
    end = found[at].end
    made = Block("list", made.text[: len(made.text) - len(newline)] + end)
    after = [Block("blank", newline)] if end and at + 1 < len(found) and found[at + 1].kind != "blank" else []
    return join([*found[:at], *before, *head, made, *after, *found[at + 1 :]])
