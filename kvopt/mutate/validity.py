"""Whether a candidate may stand for the template: every reason to refuse one, each with a stable name. Nothing is ever
repaired.

| reason | what is wrong |
|---|---|
| ``generation-failed`` | the generator gave no text that can be used |
| ``request-failed`` | the endpoint did not answer; the next search asks again |
| ``not-applicable`` | no operator found anything to change |
| ``empty`` | a field, or the whole static text, is blank |
| ``lost-slot``, ``duplicated-slot``, ``invented-slot``, ``renamed-slot``, ``slot-order`` | not its slots in order |
| ``changed-outside-scope`` | text after the first slot changed under ``scope: leading`` |
| ``changed-literal`` | a protected literal was lost, changed, repeated or invented (:mod:`kvopt.mutate.literals`) |
| ``rendering`` | rendered with probe values, a value is not there exactly as often as before |
| ``equal-to-original``, ``duplicate``, ``duplicate-tokens`` | nothing new, in text or in token ids |
| ``over-window`` | longer than the model's window |
| ``seam`` | rendered with the base's chat template, the output's token ids would change, or the seam cannot be placed |
| ``meaning``, ``meaning-unread`` | a judge finds that it asks for something else, or says nothing that can be read |
| ``sanity-…`` | a paraphrase that a look tells to be bad (:mod:`kvopt.mutate.sanity`) |
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from kvopt.errors import InputError, counted
from kvopt.mutate.literals import invented_literal, lost_literal, occurrences
from kvopt.mutate.spans import find_spans, numbering
from kvopt.task.template import SLOT, Slot, Template, parse

Scope = Literal["leading", "all"]
TokenIds = Callable[[Template], tuple[int, ...]]

PLAIN_WORDS = re.compile(r"[a-z ]+")
"""Literals that ordinary sentences use too: they may come more often."""
HARD_KINDS = frozenset(
    {"user", "code", "fence", "url", "path", "tag", "format", "number", "identifier", "caps", "json", "brace", "quoted"}
)
"""Kinds of which a candidate may not have more than the original."""

REQUEST_FAILED = "request-failed"
"""The reason of an attempt that an endpoint never answered: it is the only one that is tried again."""


@dataclass(frozen=True)
class Rejection:
    """Why a candidate is refused: a stable ``reason`` and what exactly."""

    reason: str
    detail: str = ""


def editable_lengths(template: Template, scope: Scope) -> tuple[int, ...]:
    """For each field, how many leading characters of its source may change."""
    if scope == "all":
        return tuple(len(source) for source in template.fields)
    lengths, slot_seen = [], False
    for source in template.fields:
        first = next((m.start() for m in SLOT.finditer(source) if not m[1]), None)
        lengths.append(0 if slot_seen else len(source) if first is None else first)
        slot_seen = slot_seen or first is not None
    return tuple(lengths)


def check_slots(original: Template, candidate: Template) -> Rejection | None:
    """Each field must have the original's slots in the original's order."""
    before, after = Counter(original.slot_sequence), Counter(candidate.slot_sequence)
    lost, extra = sorted((before - after).elements()), sorted((after - before).elements())
    unknown = [name for name in extra if name not in before]
    if lost and unknown:
        return Rejection("renamed-slot", f"{lost[0]} → {unknown[0]}")
    if lost:
        return Rejection("lost-slot", lost[0])
    if unknown:
        return Rejection("invented-slot", unknown[0])
    if extra:
        return Rejection("duplicated-slot", extra[0])
    for source, changed in zip(original.fields, candidate.fields, strict=True):
        if [p.name for p in parse(source) if isinstance(p, Slot)] != [
            p.name for p in parse(changed) if isinstance(p, Slot)
        ]:
            return Rejection("slot-order", ", ".join(candidate.slot_sequence))
    return None


def _without_markers(source: str) -> str:
    for start, end in reversed(numbering(source)):
        source = source[:start] + re.sub(r"[^\s]+", "", source[start:end]) + source[end:]
    return source


def probes(slots: Sequence[str]) -> dict[str, str]:
    """A value for each slot that nothing else contains, with the characters that naive filling trips over."""
    return {name: f"⟦probe {i}⟧ {{x}} {{{{{name}}}}} %s $1 \\n" for i, name in enumerate(slots)}


@dataclass
class Checker:
    """Checks candidates for one template; remembers the accepted ones to find duplicates.

    Args:
        original: the template that candidates stand for.
        scope: ``leading`` or ``all``.
        protect: compiled literals of the user (:func:`kvopt.mutate.spans.compile_protect`).
        token_ids: the ids that a candidate would be run with, to find duplicates and too long ones; None skips both.
        window: the most tokens a candidate may have.
    """

    original: Template
    scope: Scope = "leading"
    protect: Sequence[re.Pattern[str]] = ()
    token_ids: TokenIds | None = None
    window: int | None = None
    seen_text: dict[str, str] = field(default_factory=dict)
    seen_tokens: dict[tuple[int, ...], str] = field(default_factory=dict)

    @cached_property
    def _editable(self) -> tuple[int, ...]:
        return editable_lengths(self.original, self.scope)

    @cached_property
    def _original_tokens(self) -> tuple[int, ...] | None:
        return self.token_ids(self.original) if self.token_ids else None

    def check(self, candidate: Template, *, cut: bool = False, written: bool = False) -> Rejection | None:
        """None when the candidate is fine, else the first reason against it.

        Args:
            cut: text was only cut from it, and literals and messages may be fewer.
            written: somebody wrote the whole wording, and laid it out anew (:mod:`kvopt.mutate.literals`).
        """
        if cut:
            if candidate.slot_sequence != self.original.slot_sequence:
                return Rejection("lost-slot", ", ".join(self.original.slot_sequence))
            return self._new(candidate)
        if candidate.is_chat != self.original.is_chat or len(candidate.fields) != len(self.original.fields):
            return Rejection("changed-outside-scope", "another number of messages")
        if [m.role for m in candidate.messages] != [m.role for m in self.original.messages]:
            return Rejection("changed-outside-scope", "other roles")
        literals = self._written_literals if written else self._literals
        for step in (self._empty, self._slots, self._outside, literals, self._rendered, self._new):
            if rejection := step(candidate):
                return rejection
        return None

    def remember(self, candidate: Template, name: str) -> None:
        """Note an accepted candidate, so that its like is a duplicate."""
        self.seen_text[candidate.sha256] = name
        if self.token_ids:
            self.seen_tokens[self.token_ids(candidate)] = name

    def _empty(self, candidate: Template) -> Rejection | None:
        for i, (source, other) in enumerate(zip(self.original.fields, candidate.fields, strict=True)):
            if source.strip() and not other.strip():
                return Rejection("empty", f"field {i}")
        if not SLOT.sub("", "".join(candidate.fields)).strip():
            return Rejection("empty", "no static text")
        return None

    def _slots(self, candidate: Template) -> Rejection | None:
        return check_slots(self.original, candidate)

    def _outside(self, candidate: Template) -> Rejection | None:
        if self.scope == "all":
            return None
        theirs = editable_lengths(candidate, self.scope)
        for i, (source, other) in enumerate(zip(self.original.fields, candidate.fields, strict=True)):
            if source[self._editable[i] :] != other[theirs[i] :]:
                return Rejection("changed-outside-scope", f"field {i}, after the first slot")
        return None

    def _literals(self, candidate: Template) -> Rejection | None:
        for source, other in zip(self.original.fields, candidate.fields, strict=True):
            if source == other:
                continue
            before, after = _without_markers(source), _without_markers(other)
            known = Counter(before[s.start : s.end] for s in find_spans(before, self.protect))
            for literal in known:
                had, has = occurrences(before, literal), occurrences(after, literal)
                if has < had or (has > had and not PLAIN_WORDS.fullmatch(literal)):
                    return Rejection("changed-literal", f"{literal!r} is there {has} times instead of {had}")
            for span in find_spans(after, self.protect):
                literal = after[span.start : span.end]
                if (
                    span.kind in HARD_KINDS
                    and not PLAIN_WORDS.fullmatch(literal)
                    and occurrences(before, literal) < occurrences(after, literal)
                ):
                    return Rejection("changed-literal", f"{literal!r} is new")
            for character in "{}%$\\`":
                if before.count(character) != after.count(character):
                    return Rejection(
                        "changed-literal",
                        f"{character!r} is there {after.count(character)} times instead of {before.count(character)}",
                    )
        return None

    def _written_literals(self, candidate: Template) -> Rejection | None:
        fault = lost_literal(self.original, candidate, self.protect) or invented_literal(self.original, candidate)
        return Rejection("changed-literal", fault) if fault else None

    def _rendered(self, candidate: Template) -> Rejection | None:
        values = probes(self.original.slots)
        pairs = zip(_contents(self.original.fill(values)), _contents(candidate.fill(values)), strict=True)
        for before, after in pairs:
            for name, probe in values.items():
                if before.count(probe) != after.count(probe):
                    return Rejection("rendering", f"the value of {name} is there {after.count(probe)} times")
        return None

    def _new(self, candidate: Template) -> Rejection | None:
        if candidate.fields == self.original.fields:
            return Rejection("equal-to-original", "same text")
        if name := self.seen_text.get(candidate.sha256):
            return Rejection("duplicate", f"same text as {name}")
        if self.token_ids is None:
            return None
        try:
            ids = self.token_ids(candidate)
        except InputError as error:
            return Rejection("seam", str(error))
        if ids == self._original_tokens:
            return Rejection("equal-to-original", "same token ids")
        if name := self.seen_tokens.get(ids):
            return Rejection("duplicate-tokens", f"same token ids as {name}")
        if self.window is not None and len(ids) > self.window:
            return Rejection("over-window", f"{counted(len(ids), 'token')}, the window has {self.window}")
        return None


def _contents(rendered: str | list[dict[str, str]]) -> list[str]:
    return [rendered] if isinstance(rendered, str) else [message["content"] for message in rendered]
