"""Hand-written variants of the template, each taken once, in the file's order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvopt.errors import InputError
from kvopt.mutate.proposals import Proposal, Request
from kvopt.mutate.validity import Rejection
from kvopt.storage.files import RELATIVE, read_text, sha256_json
from kvopt.task.foreign import refuse_foreign_file
from kvopt.task.template import SLOT, Template
from kvopt.task.template_files import is_structured, json_lines, structured

CHECKED_AS = "written"
"""Part of the variants' hash: other checks accept other variants."""
BETWEEN = re.compile(r"^---[ \t]*(?:\r?\n|\Z)", re.M)


class FileVariants:
    """Variants of ``original`` read from ``path``.

    ``.jsonl``: one a line, ``{"template": {…}}``, ``{"messages": […]}``, a list of messages, ``{"text": "…"}`` or a
    string. ``.json``, ``.yaml``: one such variant, or a list of them. Any other file: texts with a line ``---`` between
    them. A folder: its ``.txt`` files by name. For a chat template a bare text
    replaces the only message that it can: the one with the same slots, or the one without any. Raises InputError for
    what cannot be read.
    """

    name = "file"
    family = "paraphrase"
    batch = 1

    def __init__(self, path: Path, original: Template):
        self._original = original
        self._variants = [(where, _characters(self._sources(v, where), where)) for where, v in _entries(Path(path))]
        if not self._variants:
            raise InputError("no variants", where=str(path), fix="write at least one")
        self.limit: int | None = len(self._variants)

    def sha256(self) -> str:
        """Hash of the variants: the file may change while its name does not."""
        return sha256_json([CHECKED_AS, *(sources for _, sources in self._variants)])

    def propose(self, requests: Sequence[Request]) -> list[Proposal]:
        return [self._one(request.turn) for request in requests]

    def _one(self, turn: int) -> Proposal:
        if turn >= len(self._variants):
            return Proposal(rejection=Rejection("generation-failed", "no more variants in the file"))
        where, sources = self._variants[turn]
        return Proposal(self._original.with_fields(sources), detail=where, written=True)

    def _sources(self, variant: Any, where: str) -> list[str]:
        if isinstance(variant, dict) and isinstance(variant.get("template"), dict | str):
            variant = variant["template"]
        if isinstance(variant, list):
            variant = {"messages": variant}
        if isinstance(variant, dict) and isinstance(variant.get("messages"), list):
            return self._messages(variant["messages"], where)
        text = variant.get("text") if isinstance(variant, dict) else variant
        if not isinstance(text, str):
            raise InputError("no template, messages or text", where=where)
        if not self._original.is_chat:
            return [text]
        slots = [m[2] for m in SLOT.finditer(text) if not m[1]]
        fits = [
            i
            for i, field in enumerate(self._original.fields)
            if [m[2] for m in SLOT.finditer(field) if not m[1]] == slots
        ]
        if len(fits) != 1:
            raise InputError(
                "a bare text does not say which message it replaces",
                where=where,
                fix="write messages with their roles",
            )
        return [text if i == fits[0] else field for i, field in enumerate(self._original.fields)]

    def _messages(self, messages: list[Any], where: str) -> list[str]:
        roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
        if not self._original.is_chat or roles != [m.role for m in self._original.messages]:
            raise InputError(
                "other messages than the template's", where=where, fix="same number and roles in the same order"
            )
        contents = [message.get("content") for message in messages]
        if not all(isinstance(content, str) for content in contents):
            raise InputError("a message without content", where=where)
        return contents


def _characters(sources: list[str], where: str) -> list[str]:
    """The texts. Raises InputError for one that holds what is no character, as JSON can write it."""
    try:
        "".join(sources).encode("utf-8")
    except UnicodeEncodeError:
        raise InputError("holds half of a surrogate pair, which is not a character", where=where) from None
    return sources


def _entries(path: Path) -> list[tuple[str, Any]]:
    """``(where, variant)`` pairs."""
    if path.is_dir():
        return [(str(file), _without_last_newline(read_text(file, RELATIVE))) for file in sorted(path.glob("*.txt"))]
    text = read_text(path, RELATIVE)
    if is_structured(path):
        value = structured(text, path)
        refuse_foreign_file(value, str(path))
        variants = value if isinstance(value, list) and not _is_message(value[:1]) else [value]
        return [(f"{path}, variant {i}", variant) for i, variant in enumerate(variants, 1)]
    if path.suffix != ".jsonl":
        variants = [_without_last_newline(variant) for variant in BETWEEN.split(text)]
        return [(f"{path}, variant {i + 1}", variant) for i, variant in enumerate(variants) if variant.strip()]
    return [(f"{path}:{number}", value) for number, value in json_lines(text, path)]


def _is_message(values: list[Any]) -> bool:
    return any(isinstance(value, dict) and "role" in value for value in values)


def _without_last_newline(text: str) -> str:
    """Editors end a file with a newline that is no part of the prompt."""
    return re.sub(r"\r?\n\Z", "", text)
