"""A template as pieces that can be cut: which characters each token of its prefix stands for, what belongs together,
and what must stay.

A *piece* is the text of one token, in the static text before the first slot. Pieces partition that text, whatever its
script: two tokens that share a character make one piece. *Units* are pieces that are cut together: a word, a phrase, a
sentence or list item, a paragraph, a message or a pair of messages (a worked example).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

from kvopt.mutate.blocks import blocks, units
from kvopt.mutate.spans import find_spans
from kvopt.task.examples import Example
from kvopt.task.seam import Encoder
from kvopt.task.template import Message, Slot, Static, Template, parse, unparse

IN_OUTPUTS = frozenset({"quoted", "identifier", "caps", "listed", "tag", "code", "letter"})
"""Kinds of literals that a gold output is searched for: names of things, not numbers or braces."""
_PHRASE_END = re.compile(r"[,;:，；：、،।]\s*|\s[–—-]\s|\)\s*|\s(?=\()")
_WORD = re.compile(r"\S+\s*")


@dataclass(frozen=True)
class TextPiece:
    """Characters ``start:end`` of static part ``part`` of a template's field."""

    field: int
    part: int
    start: int
    end: int


@dataclass(frozen=True)
class Literal:
    """A literal of the template, such as a label or a JSON key, with the pieces that hold its occurrences.

    Attributes:
        text: as it is written.
        occurrences: the pieces of each occurrence.
        why: what keeps it from being cut: "" (nothing), "marked" (by the user) or "in gold outputs".
    """

    text: str
    occurrences: tuple[tuple[int, ...], ...]
    why: str


@dataclass(frozen=True)
class Pieces:
    """A template taken apart.

    Attributes:
        template: the original.
        prefix: its token ids before the seam.
        pieces: what can be cut, in reading order.
        tokens: for each piece, the places of its tokens in ``prefix``.
        literals: the template's literals before the first slot.
    """

    template: Template
    prefix: tuple[int, ...]
    pieces: tuple[TextPiece, ...]
    tokens: tuple[tuple[int, ...], ...]
    literals: tuple[Literal, ...]
    _parts: tuple[tuple[Static | Slot, ...], ...] = field(repr=False, default=())

    def __len__(self) -> int:
        return len(self.pieces)

    def text(self, piece: int) -> str:
        """The characters of one piece."""
        place = self.pieces[piece]
        part = self._parts[place.field][place.part]
        assert isinstance(part, Static)
        return part.text[place.start : place.end]

    @cached_property
    def held(self) -> frozenset[int]:
        """Pieces that are never cut: those of what the user marked."""
        marked = [literal for literal in self.literals if literal.why == "marked"]
        return frozenset(piece for literal in marked for span in literal.occurrences for piece in span)

    @cached_property
    def needed(self) -> tuple[Literal, ...]:
        """Literals of which one occurrence must stay whole."""
        return tuple(literal for literal in self.literals if literal.why == "in gold outputs")

    @cached_property
    def needed_by(self) -> dict[int, tuple[int, ...]]:
        """For a piece, the places in ``needed`` of the literals that it is part of."""
        result: dict[int, tuple[int, ...]] = {}
        for number, literal in enumerate(self.needed):
            for piece in {i for span in literal.occurrences for i in span}:
                result[piece] = (*result.get(piece, ()), number)
        return result

    def allowed(self, kept: Collection[int], gone: Collection[int] | None = None) -> bool:
        """Whether these pieces make a text that may stand for the template: every marked piece is among them, and one
        whole occurrence of every needed literal. Where the text that they were cut from was allowed, ``gone`` are the
        pieces that went, and only what these are part of is looked at.
        """
        kept = kept if isinstance(kept, set | frozenset) else set(kept)
        if gone is None:
            whole, touched = self.held <= kept, set(range(len(self.needed)))
        else:
            whole, touched = self.held.isdisjoint(gone), {n for i in gone for n in self.needed_by.get(i, ())}
        return whole and all(any(map(kept.issuperset, self.needed[number].occurrences)) for number in touched)

    def broken(self, kept: Collection[int]) -> list[tuple[str, str]]:
        """Literals that these pieces no longer hold whole, each with "cut" (gone) or "broken" (a part is left)."""
        kept = set(kept)
        lost = []
        for literal in self.literals:
            if any(kept.issuperset(span) for span in literal.occurrences):
                continue
            part_left = any(piece in kept for span in literal.occurrences for piece in span)
            lost.append((literal.text, "broken" if part_left else "cut"))
        return lost

    def written(self, kept: Collection[int]) -> Template:
        """The template with these pieces alone. A message that is left without text is left out with its role, unless
        it holds a slot or nothing could be cut from it.
        """
        kept = set(kept)
        fields = []
        for f, parts in enumerate(self._parts):
            shortened: list[Static | Slot] = []
            for p, part in enumerate(parts):
                members = self._by_part.get((f, p))
                if members is None:
                    shortened.append(part)
                else:
                    shortened.append(Static("".join(self.text(i) for i in members if i in kept)))
            fields.append(unparse(shortened))
        if not self.template.is_chat:
            return Template(text=fields[0])
        messages = zip(self.template.messages, fields, strict=True)
        return Template(messages=tuple(Message(m.role, text) for m, text in messages if text or not m.content))

    def at(self, level: str) -> tuple[tuple[int, ...], ...]:
        """The pieces (their places, in order) that are cut together at a level, in reading order."""
        if level not in self._units:
            self._units[level] = tuple(pieces for pieces in self._at(level) if pieces)
        return self._units[level]

    @cached_property
    def _units(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        return {}

    def _at(self, level: str) -> Iterator[tuple[int, ...]]:
        if level == "token":
            yield from ((i,) for i in range(len(self.pieces)))
        elif level in ("messages", "message"):
            yield from self._messages(pairs=level == "messages")
        else:
            for (f, p), members in self._by_part.items():
                part = self._parts[f][p]
                assert isinstance(part, Static)
                yield from self._grouped(members, _ends(part.text, level))

    @cached_property
    def _by_part(self) -> dict[tuple[int, int], list[int]]:
        members: dict[tuple[int, int], list[int]] = {}
        for i, piece in enumerate(self.pieces):
            members.setdefault((piece.field, piece.part), []).append(i)
        return members

    def _messages(self, *, pairs: bool) -> Iterator[tuple[int, ...]]:
        """The pieces of a message that nothing else is in; or of a user's message and the answer to it."""
        whole = {
            f: tuple(members)
            for (f, _), members in self._by_part.items()
            if len(self._parts[f]) == 1 and self.template.is_chat
        }
        roles = [message.role for message in self.template.messages]
        if pairs:
            for first, second in pairwise(range(len(roles))):
                if (roles[first], roles[second]) == ("user", "assistant") and first in whole and second in whole:
                    yield (*whole[first], *whole[second])
        else:
            yield from (pieces for f, pieces in whole.items() if roles[f] not in ("user", "assistant"))

    def _grouped(self, members: Sequence[int], ends: Collection[int]) -> Iterator[tuple[int, ...]]:
        """Members in runs that end at the characters ``ends`` (a piece belongs to the run that its first visible
        character is in).
        """
        borders = sorted(ends)
        run: list[int] = []
        place = 0
        for member in members:
            start = self.pieces[member].start
            text = self.text(member)
            visible = start + len(text) - len(text.lstrip())
            crossed = False
            while place < len(borders) and borders[place] <= visible:
                place, crossed = place + 1, True
            if crossed and run:
                yield tuple(run)
                run = []
            run.append(member)
        yield tuple(run)

    def whole_messages(self, kept: Collection[int]) -> bool:
        """Whether no message between two others was emptied alone: a user's message and its answer go together."""
        if not self.template.is_chat:
            return True
        kept = set(kept)
        left = {f: any(i in kept for i in members) for (f, _), members in self._by_part.items()}
        roles = [message.role for message in self.template.messages]
        return all(
            left.get(first, True) == left.get(second, True)
            for first, second in pairwise(range(len(roles)))
            if (roles[first], roles[second]) == ("user", "assistant")
        )


def _ends(text: str, level: str) -> list[int]:
    """Characters of ``text`` at which a unit of this level ends."""
    if level == "paragraph":
        ends, position = [], 0
        for block in blocks(text):
            position += len(block.text)
            ends.append(position)
        return ends
    if level == "sentence":
        starts = [text.rfind("\n", 0, start) + 1 if _begins_line(text, start) else start for start, _ in units(text)]
        return [*starts, *(end for _, end in units(text) if end < len(text))]
    if level == "phrase":
        return sorted({*_ends(text, "sentence"), *(match.end() for match in _PHRASE_END.finditer(text))})
    return [match.end() for match in _WORD.finditer(text)]


def _begins_line(text: str, start: int) -> bool:
    """Whether only a list's marker stands between the line's beginning and ``start``."""
    line = text[text.rfind("\n", 0, start) + 1 : start]
    return len(line.split()) <= 1


def take_apart(
    template: Template,
    example: Example,
    encoder: Encoder,
    prefix: Sequence[int],
    *,
    protect: Sequence[re.Pattern[str]] = (),
    gold_texts: Sequence[str] = (),
    literals: str = "needed",
) -> Pieces:
    """The pieces of a template before its first slot.

    Args:
        template: the original.
        example: any row, to render it with.
        encoder: of the base.
        prefix: token ids before the seam; later tokens are not cut.
        protect: the user's literals, which stay.
        gold_texts: outputs; a literal that stands in one of them is needed (with ``literals="needed"``).
        literals: ``needed``, or ``all``: every literal is needed.
    """
    rendered = encoder.renderer.render(template, example.values, where=example.source)
    ids, offsets = encoder.tokenized(template, rendered)
    assert tuple(ids[: len(prefix)]) == tuple(prefix)
    parts = tuple(parse(source) for source in template.fields)
    located = _located(parts, rendered.text[: rendered.first_slot])
    pieces, tokens = _pieces(located, offsets[: len(prefix)])
    result = Pieces(template, tuple(prefix), tuple(pieces), tuple(tokens), (), parts)
    return replace(result, literals=_literals(result, protect, gold_texts, literals))


@dataclass(frozen=True)
class _Located:
    """A static part's characters ``start:end``, which the rendered text has from ``at`` on."""

    field: int
    part: int
    start: int
    end: int
    at: int


def _located(parts: Sequence[Sequence[Static | Slot]], text: str) -> list[_Located]:
    """Where the static parts before the first slot stand in the rendered text (a chat template may trim them); parts
    that it changed in another way are left out.
    """
    cursor, result = 0, list[_Located]()
    for f, field_parts in enumerate(parts):
        for p, part in enumerate(field_parts):
            if isinstance(part, Slot):
                return result
            for start, end in _trimmed(part.text):
                at = text.find(part.text[start:end], cursor)
                if at >= 0 and end > start:
                    result.append(_Located(f, p, start, end, at))
                    cursor = at + end - start
                    break
    return result


def _trimmed(text: str) -> Iterator[tuple[int, int]]:
    left, right = len(text) - len(text.lstrip()), len(text.rstrip())
    yield from ((0, len(text)), (left, len(text)), (0, right), (left, right))


def _pieces(
    located: Sequence[_Located], offsets: Sequence[tuple[int, int]]
) -> tuple[list[TextPiece], list[tuple[int, ...]]]:
    """Each located part cut where tokens end; characters that no token before the seam has are no pieces."""
    pieces, tokens = [], []
    for place in located:
        stop = place.at + place.end - place.start
        inside = [(t, a, b) for t, (a, b) in enumerate(offsets) if a < stop and b > place.at]
        runs: list[list[int]] = []
        cursor = place.at
        for t, a, b in inside:
            if b <= a:
                continue
            if runs and a < cursor:  # shares a character with the token before it
                runs[-1][1] = max(runs[-1][1], min(b, stop))
                runs[-1].append(t)
            else:
                runs.append([cursor, min(b, stop), t])
            cursor = runs[-1][1]
        for begin, end, *members in runs:
            start = place.start + begin - place.at
            pieces.append(TextPiece(place.field, place.part, start, place.start + end - place.at))
            tokens.append(tuple(members))
    return pieces, tokens


def _literals(
    pieces: Pieces, protect: Sequence[re.Pattern[str]], gold_texts: Sequence[str], policy: str
) -> tuple[Literal, ...]:
    by_text: dict[tuple[str, str], list[tuple[int, ...]]] = {}
    for (f, p), members in pieces._by_part.items():
        part = pieces._parts[f][p]
        assert isinstance(part, Static)
        for span in find_spans(part.text, protect):
            inside = tuple(
                i for i in members if pieces.pieces[i].start < span.end and pieces.pieces[i].end > span.start
            )
            text = part.text[span.start : span.end]
            if inside and text.strip():
                by_text.setdefault((text, span.kind), []).append(inside)
    gold = "\n".join(gold_texts)
    found = []
    for (text, kind), occurrences in by_text.items():
        in_gold = kind in IN_OUTPUTS and any(form in gold for form in _forms(text))
        needed = policy == "all" or in_gold
        why = "marked" if kind == "user" else "in gold outputs" if needed else ""
        found.append(Literal(text, tuple(occurrences), why))
    return tuple(found)


def _forms(text: str) -> set[str]:
    """A literal as a gold output may write it: as it is, or without its quotes when they hold a word."""
    bare = text.strip("\"'`“”‘’«»")
    return {text} | ({bare} if len(bare) > 1 and not bare.isdigit() else set())
