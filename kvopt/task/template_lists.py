"""Several templates in one file: written by hand, or by a model.

``.yaml``, ``.yml`` or ``.json``: a list of entries with a ``name`` and either ``messages`` or ``text``. ``.jsonl``: an
entry a line, as pools of wordings have them; other keys are passed over, and one without a name is ``FILE-LINE``. Any
other file: texts with a line ``---`` between them, named ``FILE-1``, ``FILE-2``, …. A text with slots is the whole
prompt (one user message for a chat template); one without takes the place of the static text before the first slot.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from kvopt.config.section import LABEL
from kvopt.errors import InputError
from kvopt.storage.files import RELATIVE, parsed_json, read_text
from kvopt.task.template import Template
from kvopt.task.template_files import is_structured, structured, template_of

KEYS = ("name", "text", "messages")
BETWEEN = re.compile(r"^---[ \t]*\r?(?:\n|\Z)", re.MULTILINE)


def read_templates(path: Path, original: Template) -> dict[str, Template]:
    """The templates of a file by name, in its order. Raises InputError for the first that cannot be used."""
    source = read_text(path, RELATIVE)
    if path.suffix.lower() == ".jsonl":
        entries = _lines(source, path)
    else:
        entries = _listed(source, path) if is_structured(path) else _divided(source, path)
    if not entries:
        raise InputError("holds no templates", where=str(path))
    templates: dict[str, Template] = {}
    for name, value in entries:
        if name in templates:
            raise InputError(f"two templates are named {name!r}", where=str(path))
        templates[name] = template_of(value, original, where=f"{path}: {name}")
    return templates


def _lines(source: str, path: Path) -> list[tuple[str, Any]]:
    entries = []
    for number, line in enumerate(source.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            item = parsed_json(line)
        except ValueError as error:
            raise InputError(f"not JSON: {error}", where=where) from None
        if isinstance(item, dict):
            item = {"name": f"{_stem(path)}-{number}"} | {key: item[key] for key in KEYS if key in item}
        entries.append(_entry(item, where))
    return entries


def _stem(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "-", path.stem)


def _divided(source: str, path: Path) -> list[tuple[str, Any]]:
    texts = [text.strip("\n") for text in BETWEEN.split(source)]
    return [(f"{_stem(path)}-{number}", text) for number, text in enumerate((t for t in texts if t.strip()), 1)]


def _listed(source: str, path: Path) -> list[tuple[str, Any]]:
    value = structured(source, path)
    if not isinstance(value, list):
        raise InputError("is not a list of templates", where=str(path), fix="write - {name: …, text: …}")
    return [_entry(item, f"{path}[{i}]") for i, item in enumerate(value)]


def _entry(item: Any, where: str) -> tuple[str, Any]:
    if not isinstance(item, dict) or not isinstance(item.get("name"), str) or not re.match(LABEL, item["name"]):
        fix = "letters, digits, - and _; an entry has name and text, or name and messages"
        raise InputError("the entry has no usable name", where=where, fix=fix)
    if unknown := sorted(item.keys() - {*KEYS}):
        raise InputError(f"unknown key {unknown[0]!r}", where=where, fix="known: name, text, messages")
    if isinstance(item.get("text"), str) and "messages" not in item:
        return item["name"], item["text"]
    return item["name"], {key: item[key] for key in ("messages", "text") if key in item}
