"""What stands beside a recovered slot: the name that the text before it gives, and words there by chance."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence

SETTLED = 8  # rows in which a word beside a slot is hardly there by chance
LONGEST_NAME = 3  # words of a label that become a name
_LABEL = re.compile(r"([^\W\d_][\w \-]*?)\W{0,3}[:=]\W*\Z")
_TAG = re.compile(r"[<\[]([^\W\d]\w*)[>\]]\s*\Z")
_WORD_BEFORE = re.compile(r"([^\W_]+)[ \t]+\Z")
_WORD_AFTER = re.compile(r"[ \t]+([^\W_]+)")


def slot_name(before: str) -> str | None:
    """A name from the text before a slot: ``Customer message: `` gives ``customer_message``, ``<text>`` gives ``text``;
    None where nothing labels it.
    """
    line = before.splitlines()[-1] if before and not before.endswith("\n") else ""
    if not line.strip():  # a label on a line of its own
        line = before.rstrip("\n").rpartition("\n")[2]
    found = _LABEL.search(line) or _TAG.search(line)
    words = re.findall(r"[A-Za-z0-9]+", found[1])[-LONGEST_NAME:] if found else []
    name = "_".join(words).lower()
    return name if re.match(r"[a-z]", name) else None


def slot_names(keys: Sequence[Hashable], before: Sequence[str]) -> dict[Hashable, str]:
    """A name for every slot, from the text before its first place; ``input`` or ``input_1`` … where that gives none.

    Args:
        keys: of the slots in reading order; slots with the same key are one.
        before: the text before each.
    """
    names: dict[Hashable, str] = {}
    alone = len(set(keys)) == 1
    for key, text in zip(keys, before, strict=True):
        if key in names:
            continue
        name = slot_name(text)
        if name in (None, "output"):  # the column of the gold output
            name = "input" if alone else f"input_{len(names) + 1}"
        taken = sum(re.fullmatch(rf"{name}(_\d+)?", other) is not None for other in names.values())
        names[key] = f"{name}_{taken + 1}" if taken and name in names.values() else str(name)
    return names


def doubts(literals: Sequence[str], rows: int) -> list[str]:
    """A note about words right beside a slot that so few rows may share by chance; none where they cannot.

    Args:
        literals: the texts around the slots of one text, one more than slots.
    """
    if rows >= SETTLED:
        return []
    words = [match[1] for literal in literals[:-1] if (match := _WORD_BEFORE.search(literal))]
    words += [match[1] for literal in literals[1:] if (match := _WORD_AFTER.match(literal))]
    if not words:
        return []
    named = ", ".join(map(repr, dict.fromkeys(words)))
    what = f"all {rows} prompts have {named} right beside a slot"
    return [f"{what}: taken for template, but it may be chance; {SETTLED} or more prompts would settle it"]
