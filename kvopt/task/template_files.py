"""Templates from where they are written: the config, and files that say it in the shape of the run's own template.

Inline marks say what mutations must not change: ``{{keep:exact words}}`` in a template is ``exact words`` in every
prompt, and protected like an entry of ``mutations.protect``. Marked text cannot hold a slot or ``}}``. A template
object never holds marks: they are taken out where a template is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml

from kvopt.config.section import LABEL
from kvopt.config.sections import MessageConfig, TemplateConfig
from kvopt.errors import InputError
from kvopt.storage.files import RELATIVE, parsed_json, read_text
from kvopt.task.foreign import refuse_foreign_file
from kvopt.task.template import Slot, Template, parse, unparse

ROLES = get_args(MessageConfig.model_fields["role"].annotation)
MARK = re.compile(r"\{\{keep:(.*?)\}\}", re.DOTALL)
BETWEEN = re.compile(r"^---[ \t]*\r?(?:\n|\Z)", re.MULTILINE)
KEYS = ("name", "text", "messages")


def take_marks(template: Template, *, where: str = "template") -> tuple[Template, tuple[str, ...]]:
    """The template without its marks, and the marked literals in order, each once. Raises InputError for an empty
    mark.
    """
    kept = [literal for field in template.fields for literal in MARK.findall(field)]
    if any(not literal.strip() for literal in kept):
        raise InputError("{{keep:}} marks nothing", where=where, fix="write {{keep:the words to keep}}")
    if not kept:
        return template, ()
    fields = [MARK.sub(lambda match: match[1], field) for field in template.fields]
    return template.with_fields(fields), tuple(dict.fromkeys(kept))


def configured_template(section: TemplateConfig, base_dir: Path) -> tuple[Template, tuple[str, ...]]:
    """A config's template without its ``{{keep:…}}`` marks, and the literals that they mark. Raises InputError."""
    if section.file is not None:
        template = _of_file(base_dir / section.file)
    elif section.text is not None:
        template = Template.from_text(section.text)
    else:
        template = Template.from_messages([message.model_dump() for message in section.messages or []])
    return take_marks(template)


def template_from_file(path: Path, original: Template) -> Template:
    """The template that a file stands for.

    ``.json``, ``.yaml`` and ``.yml`` hold chat messages (a list of them), or ``messages`` or ``text``. Any other file
    is plain text: with the original's slots it is the whole prompt (one user message for a chat template); without
    slots it takes the place of the static text before the first slot. ``FILE#NAME`` is one of several templates in a
    file (:func:`read_templates`).

    Raises:
        InputError: the file cannot be read, or its slots are not the original's.
    """
    file, name = _of_several(path)
    if name and not path.is_file():
        templates = read_templates(file, original, fix=None)
        if name not in templates:
            few = ", ".join(list(templates)[:5]) + (", …" if len(templates) > 5 else "")
            raise InputError(f"has no template {name!r}", where=str(file), fix=f"known: {few}")
        return templates[name]
    source = read_text(path)
    return template_of(_prompt(source, path) if is_structured(path) else source, original, where=str(path))


def name_of_file(argument: str) -> str:
    """What a context is called that is the text of a file: the file's name without its ending, or NAME of FILE#NAME."""
    return _of_several(Path(argument))[1] or Path(argument).stem


def _of_several(path: Path) -> tuple[Path, str]:
    """FILE and NAME of ``FILE#NAME``; another path is a whole file, and NAME is empty."""
    file, _, name = path.name.rpartition("#")
    return (path.with_name(file), name) if file and "." not in name else (path, "")


def template_of(source: str | Mapping[str, Any], original: Template, *, where: str) -> Template:
    """The template that plain text, or a mapping with ``messages`` or ``text``, stands for, as in
    :func:`template_from_file`. Raises InputError, with ``where``, for slots that are not the original's.
    """
    if not isinstance(source, str):
        template = Template.from_json(source, where=where)
    elif any(isinstance(part, Slot) for part in parse(source)):
        content = {"role": "user", "content": source}
        template = (
            Template.from_messages([content], where=where)
            if original.is_chat
            else Template.from_text(source, where=where)
        )
    else:
        template = _with_leading(original, source, where)
    template, _ = take_marks(template, where=where)
    if sorted(template.slot_sequence) != sorted(original.slot_sequence):
        raise InputError(
            f"has the slots {', '.join(template.slot_sequence)}, the template has {', '.join(original.slot_sequence)}",
            where=where,
        )
    return template


def is_structured(path: Path) -> bool:
    """Whether a file holds JSON or YAML, by its ending, and not a text."""
    return path.suffix.lower() in (".json", ".yaml", ".yml")


def structured(source: str, path: Path) -> Any:
    """The value of a file that :func:`is_structured`. Raises InputError."""
    try:
        return parsed_json(source) if path.suffix.lower() == ".json" else yaml.safe_load(source)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: JSON, and dates that do not exist
        raise InputError(f"not valid JSON or YAML: {error}".replace("\n", " "), where=str(path)) from None


def json_lines(source: str, path: Path) -> list[tuple[int, Any]]:
    """(number, value) of each line of a file of JSON lines that is not blank. Raises InputError."""
    values = []
    for number, line in enumerate(source.split("\n"), 1):
        if line.strip():
            try:
                values.append((number, parsed_json(line)))
            except ValueError as error:
                raise InputError(f"not JSON: {error}", where=f"{path}:{number}") from None
    return values


def written_out(section: TemplateConfig, base_dir: Path) -> dict[str, Any]:
    """``messages`` or ``text`` of a config's template file, marks and all, as they stand in a config. Raises
    InputError.
    """
    assert section.file is not None
    path = base_dir / section.file
    if not is_structured(path):
        return {"text": read_text(path, RELATIVE)}
    prompt = _prompt(read_text(path, RELATIVE), path)
    return {key: prompt.get(key) for key in ("messages", "text")}


def _of_file(path: Path) -> Template:
    """The template of a config's file. Raises InputError."""
    if not is_structured(path):
        return Template.from_file(path)
    template = Template.from_json(_prompt(read_text(path, RELATIVE), path), where=str(path))
    for i, message in enumerate(template.messages):
        if message.role not in ROLES:
            raise InputError(f"unknown role {message.role!r}", where=f"{path}[{i}]", fix=f"one of {', '.join(ROLES)}")
    return template


def _prompt(source: str, path: Path) -> dict[str, Any]:
    """The mapping with ``messages`` or ``text`` that a JSON or YAML file stands for. Raises InputError."""
    value = structured(source, path)
    refuse_foreign_file(value, str(path))
    if isinstance(value, list):
        value = {"messages": value}
    if not isinstance(value, dict) or not ("messages" in value or "text" in value):
        fix = "write [{role: …, content: …}, …], or text: …"
        raise InputError("holds no chat messages and no text", where=str(path), fix=fix)
    return value


def _with_leading(original: Template, text: str, where: str) -> Template:
    fields = list(original.fields)
    first = next(i for i, field in enumerate(fields) if any(isinstance(part, Slot) for part in parse(field)))
    if not original.is_chat:
        parts = parse(fields[0])
        start = next(i for i, part in enumerate(parts) if isinstance(part, Slot))
        return original.with_fields([text + unparse(parts[start:])])
    if first == 0:
        raise InputError(
            "has no slots, and the template's first message holds one",
            where=where,
            fix="write the slots into the text",
        )
    kept = [{"role": m.role, "content": m.content} for m in original.messages[first:]]
    return Template.from_messages(
        [{"role": original.messages[0].role, "content": text.rstrip("\n")}, *kept], where=where
    )


def read_templates(path: Path, original: Template, fix: str | None = RELATIVE) -> dict[str, Template]:
    """The templates of a file by name, in its order; ``fix`` is said of a file that is not there.

    ``.yaml``, ``.yml`` or ``.json``: a list of entries with a ``name`` and either ``messages`` or ``text``. ``.jsonl``:
    an entry a line, as pools of wordings have them; other keys are passed over, and one without a name is
    ``FILE-LINE``. Any other file: texts with a line ``---`` between them, named ``FILE-1``, ``FILE-2``, …. A text with
    slots is the whole prompt (one user message for a chat template); one without takes the place of the static text
    before the first slot.

    Raises:
        InputError: for the first template that cannot be used.
    """
    source = read_text(path, fix)
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
    for number, item in json_lines(source, path):
        if isinstance(item, dict):
            item = {"name": f"{_stem(path)}-{number}"} | {key: item[key] for key in KEYS if key in item}
        entries.append(_entry(item, f"{path}:{number}"))
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
