r"""A prompt template C: static text with named slots ``{{slot}}``, as plain text or as chat messages.

Everything but a well-formed slot is literal: single braces, JSON, ``%``, ``$`` and line endings stay as they are. A
backslash in front of a slot (``\{{name}}``) makes it literal text too, and only there: ``\\{{name}}`` is one backslash
and the slot, ``\n`` stays two characters. Slot values are inserted once and never scanned again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from kvopt.errors import InputError
from kvopt.storage.files import RELATIVE, read_text, sha256_json

SLOT = re.compile(r"(\\*)(\{\{\s*([A-Za-z_][A-Za-z0-9_.\-]*)\s*\}\})")


@dataclass(frozen=True)
class Static:
    """Literal text, with escapes already resolved."""

    text: str


@dataclass(frozen=True)
class Slot:
    """A place that an example's value fills."""

    name: str


Part = Static | Slot


@dataclass(frozen=True)
class Message:
    """One chat message; ``content`` is template source and may hold slots."""

    role: str
    content: str


def parse(source: str) -> tuple[Part, ...]:
    """Split template source into literal text and slots; adjacent literals are joined, empty ones dropped."""
    parts: list[Part] = []
    literal = ""
    end = 0
    for match in SLOT.finditer(source):
        literal += source[end : match.start()]
        end = match.end()
        backslashes = len(match[1])
        literal += "\\" * (backslashes // 2)
        if backslashes % 2:
            literal += match[2]
            continue
        if literal:
            parts.append(Static(literal))
        parts.append(Slot(match[3]))
        literal = ""
    literal += source[end:]
    if literal:
        parts.append(Static(literal))
    return tuple(parts)


def escape(text: str) -> str:
    """Template source whose only part is the literal ``text``."""
    return SLOT.sub(lambda match: "\\" * (2 * len(match[1]) + 1) + match[2], text)


def unparse(parts: Sequence[Part]) -> str:
    """The inverse of :func:`parse` (adjacent literals are joined): ``parse(unparse(parts)) == parts``."""
    source = literal = ""
    for part in parts:
        if isinstance(part, Static):
            literal += part.text
            continue
        ending = len(literal) - len(literal.rstrip("\\"))
        source += escape(literal) + "\\" * ending + "{{" + part.name + "}}"
        literal = ""
    return source + escape(literal)


def fill_source(source: str, values: Mapping[str, str]) -> str:
    """``source`` with each slot replaced by its value."""
    return "".join(part.text if isinstance(part, Static) else values[part.name] for part in parse(source))


@dataclass(frozen=True)
class Template:
    """Chat ``messages`` or plain ``text``, exactly one of the two, with at least one slot.

    Attributes:
        messages: chat messages in order, the last one not from the assistant; empty for a text template.
        text: template source of a text template, else None.
    """

    messages: tuple[Message, ...] = ()
    text: str | None = None

    @classmethod
    def from_text(cls, text: str, *, where: str = "template.text") -> Template:
        """A text template, checked. Raises InputError for one without slots."""
        return cls(text=text)._checked(where)

    @classmethod
    def from_messages(cls, messages: Sequence[Mapping[str, str]], *, where: str = "template.messages") -> Template:
        """A chat template from ``{"role", "content"}`` mappings, checked."""
        if not messages:
            raise InputError("no messages", where=where, fix="give at least one user message with a slot")
        for i, m in enumerate(messages):
            if not (isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)):
                raise InputError("a message needs a role and a content, both text", where=f"{where}[{i}]")
        return cls(messages=tuple(Message(m["role"], m["content"]) for m in messages))._checked(where)

    @classmethod
    def from_file(cls, path: Path) -> Template:
        """A text template from a UTF-8 file, line endings kept. Raises InputError when it cannot be read."""
        text = read_text(path, RELATIVE)
        return cls.from_text(text, where=str(path))

    def _checked(self, where: str) -> Template:
        try:
            "".join(self.fields).encode("utf-8")
        except UnicodeEncodeError:
            raise InputError("holds half of a surrogate pair, which is not a character", where=where) from None
        if not self.slots:
            raise InputError("the template has no slots", where=where, fix="mark the variable input as {{name}}")
        if self.messages and self.messages[-1].role == "assistant":
            raise InputError(
                "the last message is the assistant's",
                where=where,
                fix="end with the user's message; the answer comes from the data",
            )
        return self

    @property
    def is_chat(self) -> bool:
        return bool(self.messages)

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The template source strings: one a message, or the one text."""
        return tuple(m.content for m in self.messages) if self.is_chat else (self.text or "",)

    def with_fields(self, fields: Sequence[str]) -> Template:
        """The same template with other source strings (same number)."""
        if len(fields) != len(self.fields):
            raise ValueError(f"{len(fields)} fields for a template of {len(self.fields)}")
        if self.is_chat:
            return Template(messages=tuple(replace(m, content=f) for m, f in zip(self.messages, fields, strict=True)))
        return Template(text=fields[0])

    @cached_property
    def slot_sequence(self) -> tuple[str, ...]:
        """Every slot occurrence in reading order, repeats included."""
        return tuple(part.name for field in self.fields for part in parse(field) if isinstance(part, Slot))

    @cached_property
    def slots(self) -> tuple[str, ...]:
        """Slot names, each once, in order of first appearance."""
        return tuple(dict.fromkeys(self.slot_sequence))

    def fill(self, values: Mapping[str, str]) -> str | list[dict[str, str]]:
        """One prompt: a string, or messages for ``apply_chat_template``. Raises KeyError for a missing value."""
        if self.is_chat:
            return [{"role": m.role, "content": fill_source(m.content, values)} for m in self.messages]
        return fill_source(self.text or "", values)

    def without_trailing_static(self) -> Template:
        """Without the static text after the first slot: later slots follow it, each on its own line."""
        fields, slot_seen = [], False
        for field in self.fields:
            parts = parse(field)
            first = next((i for i, part in enumerate(parts) if isinstance(part, Slot)), len(parts))
            lead = "" if slot_seen else unparse(parts[:first])
            fields.append(lead + "\n".join("{{" + p.name + "}}" for p in parts[first:] if isinstance(p, Slot)))
            slot_seen = slot_seen or first < len(parts)
        if not self.is_chat:
            return Template(text=fields[0])
        messages = zip(self.messages, fields, strict=True)
        return Template(messages=tuple(Message(m.role, f) for m, f in messages if f))

    def to_json(self) -> dict[str, Any]:
        """``{"messages": [...]}`` or ``{"text": ...}``, what :meth:`from_json` reads."""
        if self.is_chat:
            return {"messages": [{"role": m.role, "content": m.content} for m in self.messages]}
        return {"text": self.text}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], *, where: str = "template") -> Template:
        """The template of :meth:`to_json`. Raises InputError when neither or both keys are there."""
        messages, text = value.get("messages"), value.get("text")
        if (messages is None) == (text is None):
            raise InputError("needs either messages or text", where=where)
        if isinstance(text, str):
            return cls.from_text(text, where=where)
        if isinstance(messages, Sequence) and not isinstance(messages, str):
            return cls.from_messages(messages, where=where)
        raise InputError("text must be a string and messages a list", where=where)

    @cached_property
    def sha256(self) -> str:
        """Identity of the template's text."""
        return sha256_json(self.to_json())
