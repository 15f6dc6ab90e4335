"""What a mutation changed, word by word, against the text it came from."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import pairwise
from typing import Any, Literal

from kvopt.task.template import Template

WORD = re.compile(r"\{\{[^{}]*\}\}|\w+|[^\w\s]|[^\S\n]+|\n")
AROUND = 16  # unchanged words kept beside a change in a long text
LONG = 400  # words from which on unchanged stretches are cut
EXACT = 400 * 400  # pairs of words, or of lines, up to which all are compared
MOST = 5000 * 5000  # pairs of words up to which texts without common lines are compared at all

Kind = Literal["same", "gone", "new", "cut"]


@dataclass(frozen=True)
class Piece:
    """A stretch of text: in both (``same``), only in the old (``gone``) or the new (``new``), or left out (``cut``)."""

    kind: Kind
    text: str


def template_diff(old: Template, new: Template) -> list[tuple[str, list[Piece]]]:
    """For each message (or the one text): its role, and the pieces from old to new. Messages are paired in order; where
    there are fewer or more of them, those of one role that are most alike, and the others stand alone.
    """
    mine, theirs = _fields(old), _fields(new)
    pairs = list(zip(mine, theirs, strict=True)) if len(mine) == len(theirs) else _paired(mine, theirs)
    return [(before[0] or after[0], diff(before[1], after[1])) for before, after in pairs]


Message = tuple[str, str]
"""Role and content."""


def _paired(mine: Sequence[Message], theirs: Sequence[Message]) -> list[tuple[Message, Message]]:
    """Messages of both in order, paired by how alike they are; ``("", "")`` where one stands alone."""
    none = ("", "")
    best: dict[tuple[int, int], float] = {}

    def alike(i: int, j: int) -> float:
        """How many words the shorter one has in common with the other, from just above 0 to 1; 0 for another role."""
        (role, text), (other_role, other) = mine[i], theirs[j]
        a, b = Counter(WORD.findall(text)), Counter(WORD.findall(other))
        return 0.01 + (a & b).total() / max(1, min(a.total(), b.total())) if role == other_role else 0.0

    for i in range(len(mine), -1, -1):
        for j in range(len(theirs), -1, -1):
            ends = i == len(mine) or j == len(theirs)
            alone = max(best.get((i + 1, j), 0.0), best.get((i, j + 1), 0.0))
            best[i, j] = alone if ends else max(alone, alike(i, j) + best[i + 1, j + 1])
    pairs, i, j = [], 0, 0
    while i < len(mine) or j < len(theirs):
        if i < len(mine) and j < len(theirs) and best[i, j] == alike(i, j) + best[i + 1, j + 1]:
            pairs.append((mine[i], theirs[j]))
            i, j = i + 1, j + 1
        elif j == len(theirs) or (i < len(mine) and best[i, j] == best[i + 1, j]):
            pairs.append((mine[i], none))
            i += 1
        else:
            pairs.append((none, theirs[j]))
            j += 1
    return pairs


def diff(old: str, new: str) -> list[Piece]:
    """Pieces that read as the new text with the old one's words in between. Long unchanged stretches are cut."""
    a, b = WORD.findall(old), WORD.findall(new)
    pieces: list[Piece] = []
    long = len(a) + len(b) > 2 * LONG
    stretches = _merged(_stretches(a, b))
    for position, (same, gone, come) in enumerate(stretches):
        if same:
            pieces += _cut(come, position > 0, position < len(stretches) - 1) if long else [_same(come)]
            continue
        if gone:
            pieces.append(Piece("gone", "".join(gone)))
        if come:
            pieces.append(Piece("new", "".join(come)))
    return pieces


Stretch = tuple[bool, list[str], list[str]]
"""Whether it is the same in both texts, and its words in the old and in the new one."""


def _stretches(a: list[str], b: list[str]) -> list[Stretch]:
    """What two lists of words have in common, in order. Comparing words takes up to the cube of their number, so what
    begins and ends alike is set aside, long texts are compared by lines first, and what is still long without its most
    frequent words.
    """
    head = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    rest = min(len(a), len(b)) - head
    tail = next((i for i in range(rest) if a[-1 - i] != b[-1 - i]), rest)
    inner = a[head : len(a) - tail], b[head : len(b) - tail]
    return [(True, a[:head], a[:head]), *_inner(*inner), (True, a[len(a) - tail :], a[len(a) - tail :])]


def _inner(a: list[str], b: list[str]) -> list[Stretch]:
    size = len(a) * len(b)
    if size <= EXACT:
        return _compared(a, b, all_words=True)
    lines, others = _lines(a), _lines(b)
    common = set(lines) & set(others)
    if common and len(lines) * len(others) <= EXACT:
        stretches: list[Stretch] = []
        for same, gone, come in _compared(lines, others, all_words=True):
            old, new = [w for line in gone for w in line], [w for line in come for w in line]
            stretches += [(True, old, new)] if same else _stretches(old, new)
        return stretches
    return _compared(a, b, all_words=False) if size <= MOST else [(False, a, b)]


def _compared(a: list[Any], b: list[Any], *, all_words: bool) -> list[tuple[bool, list[Any], list[Any]]]:
    codes = SequenceMatcher(None, a, b, autojunk=not all_words).get_opcodes()
    return [(tag == "equal", a[a0:a1], b[b0:b1]) for tag, a0, a1, b0, b1 in codes]


def _lines(words: list[str]) -> list[tuple[str, ...]]:
    ends = [i + 1 for i, word in enumerate(words) if word == "\n"]
    edges = [0, *ends, *([len(words)] if not ends or ends[-1] < len(words) else [])]
    return [tuple(words[i:j]) for i, j in pairwise(edges)]


def _merged(stretches: list[Stretch]) -> list[Stretch]:
    """The same without empty ones, and with neighbours of one sort as one."""
    merged: list[Stretch] = []
    for same, old, new in stretches:
        if not old and not new:
            continue
        if merged and merged[-1][0] == same:
            merged[-1] = (same, merged[-1][1] + old, merged[-1][2] + new)
        else:
            merged.append((same, old, new))
    return merged


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


def _fields(template: Template) -> list[Message]:
    if template.is_chat:
        return [(m.role, m.content) for m in template.messages]
    return [("text", template.text or "")]
