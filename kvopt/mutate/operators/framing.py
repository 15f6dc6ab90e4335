"""A sentence that only asks for care comes or goes."""

from __future__ import annotations

from random import Random

from kvopt.mutate.blocks import blocks, join, sentences, units
from kvopt.mutate.operator import operator
from kvopt.mutate.spans import Field

FRAMES = (
    "Follow these instructions carefully.",
    "Read the instructions below carefully.",
    "Please follow the instructions closely.",
    "Work carefully.",
    "Take care to follow every instruction.",
    "Here is what you have to do.",
    "Keep to the instructions.",
)


@operator("framing", "lexical")
def framing(field: Field, rng: Random) -> str | None:
    """A sentence such as "Follow these instructions carefully." in front of the field or after its introduction;
    dropped when there is one.
    """
    found = blocks(field.text)
    for i, block in enumerate(found):
        if block.kind == "paragraph":
            parts = sentences(block.body)
            kept = [(s, gap) for s, gap in parts if s not in FRAMES]
            if 0 < len(kept) < len(parts):
                found[i] = block.with_body("".join(s + gap for s, gap in kept).rstrip(" "))
                return join(found)
    if (
        sum(1 for _ in units(field.text)) < 4
        or not found
        or found[0].kind != "paragraph"
        or found[0].text.startswith("<")
        or field.holds_slot(found[0].text)
    ):
        return None
    frame, parts = rng.choice(FRAMES), sentences(found[0].body)
    after = 1 if parts[0][0].startswith(("You are", "You're", "Act as")) and parts[0][0].endswith(".") else 0
    if after and len(parts) == 1:
        parts[0] = (parts[0][0], " ")
    parts.insert(after, (frame, " " if after < len(parts) else ""))
    found[0] = found[0].with_body("".join(s + gap for s, gap in parts))
    return join(found)
