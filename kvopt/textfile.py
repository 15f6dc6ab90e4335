"""A text context from a file, in the shape of the run's own template."""

from __future__ import annotations

from pathlib import Path

import yaml

from kvopt.errors import InputError
from kvopt.keep import take_marks
from kvopt.template import Slot, Template, parse, unparse


def template_from_file(path: Path, original: Template) -> Template:
    """The template that a file stands for.

    ``.json``, ``.yaml`` and ``.yml`` hold ``messages`` or ``text``. Any other file is plain text: with the original's
    slots it is the whole prompt (one user message for a chat template); without slots it takes the place of the static
    text before the first slot.

    Raises:
        InputError: the file cannot be read, or its slots are not the original's.
    """
    try:
        source = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError("no such file", where=str(path)) from None
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 text (at byte {error.start})", where=str(path)) from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", where=str(path)) from None
    if path.suffix.lower() in (".json", ".yaml", ".yml"):
        template = _structured(source, path)
    elif any(isinstance(part, Slot) for part in parse(source)):
        content = {"role": "user", "content": source}
        template = (
            Template.from_messages([content], where=str(path))
            if original.is_chat
            else Template.from_text(source, where=str(path))
        )
    else:
        template = _with_leading(original, source, path)
    template, _ = take_marks(template, where=str(path))
    if sorted(template.slot_sequence) != sorted(original.slot_sequence):
        raise InputError(
            f"has the slots {', '.join(template.slot_sequence)}, the template has {', '.join(original.slot_sequence)}",
            where=str(path),
        )
    return template


def _structured(source: str, path: Path) -> Template:
    try:
        value = yaml.safe_load(source)  # JSON is YAML
    except yaml.YAMLError as error:
        raise InputError(f"not valid JSON or YAML: {error}".replace("\n", " "), where=str(path)) from None
    if not isinstance(value, dict):
        raise InputError("is not a mapping with messages or text", where=str(path))
    return Template.from_json(value, where=str(path))


def _with_leading(original: Template, text: str, path: Path) -> Template:
    fields = list(original.fields)
    first = next(i for i, field in enumerate(fields) if any(isinstance(part, Slot) for part in parse(field)))
    if not original.is_chat:
        parts = parse(fields[0])
        start = next(i for i, part in enumerate(parts) if isinstance(part, Slot))
        return original.with_fields([text + unparse(parts[start:])])
    if first == 0:
        raise InputError(
            "has no slots, and the template's first message holds one",
            where=str(path),
            mend="write the slots into the text",
        )
    kept = [{"role": m.role, "content": m.content} for m in original.messages[first:]]
    return Template.from_messages(
        [{"role": original.messages[0].role, "content": text.rstrip("\n")}, *kept], where=str(path)
    )
