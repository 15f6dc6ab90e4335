"""What a mutation changed, word by word, against the text it came from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

from kvopt.template import Template

WORD = re.compile(r"\{\{[^{}]*\}\}|\w+|[^\w\s]|[^\S\n]+|\n")
AROUND = 16  # unchanged words kept beside a change in a long text
LONG = 400  # words from which on unchanged stretches are cut

Kind = Literal["same", "gone", "new", "cut"]


@dataclass(frozen=True)
class Piece:
    """A stretch of text: in both (``same``), only in the old (``gone``) or the new (``new``), or left out (``cut``)."""

    kind: Kind
    text: str


def template_diff(old: Template, new: Template) -> list[tuple[str, list[Piece]]]:
    """For each message (or the one text): its role, and the pieces from old to new; messages are paired in order."""
    mine, theirs = _fields(old), _fields(new)
    pairs = []
    for i in range(max(len(mine), len(theirs))):
        role = theirs[i][0] if i < len(theirs) else mine[i][0]
        pairs.append((role, diff(mine[i][1] if i < len(mine) else "", theirs[i][1] if i < len(theirs) else "")))
    return pairs


def diff(old: str, new: str) -> list[Piece]:
    """Pieces that read as the new text with the old one's words in between. Long unchanged stretches are cut."""
    a, b = WORD.findall(old), WORD.findall(new)
    matcher = SequenceMatcher(None, a, b, autojunk=False)
    pieces: list[Piece] = []
    long = len(a) + len(b) > 2 * LONG
    opcodes = matcher.get_opcodes()
    for position, (tag, a0, a1, b0, b1) in enumerate(opcodes):
        if tag == "equal":
            pieces += _cut(b[b0:b1], position > 0, position < len(opcodes) - 1) if long else [_same(b[b0:b1])]
            continue
        if a1 > a0:
            pieces.append(Piece("gone", "".join(a[a0:a1])))
        if b1 > b0:
            pieces.append(Piece("new", "".join(b[b0:b1])))
    return pieces


def _cut(words: list[str], after: bool, before: bool) -> list[Piece]:
    """An unchanged stretch without its middle; ``after`` and ``before`` say whether a change is beside it."""
    head, tail = AROUND * after, AROUND * before
    left_out = len(words) - head - tail
    if left_out <= AROUND:
        return [_same(words)]
    count = sum(not word.isspace() for word in words[head : len(words) - tail])
    parts = [_same(words[:head]), Piece("cut", f"{count} unchanged words"), _same(words[len(words) - tail :])]
    return [piece for piece in parts if piece.text]


def _same(words: list[str]) -> Piece:
    return Piece("same", "".join(words))


def _fields(template: Template) -> list[tuple[str, str]]:
    if template.is_chat:
        return [(m.role, m.content) for m in template.messages]
    return [("text", template.text or "")]
