"""Reading files of rendered prompts, for ``kvopt init --infer FILE``."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvopt.errors import InputError
from kvopt.storage.files import read_text
from kvopt.task.columns import NoValue, as_text
from kvopt.task.infer import Inferred, Prompt, infer_template
from kvopt.task.public_layouts import is_alpaca, request
from kvopt.task.readers import Record, read_records

SEPARATOR = re.compile(r"^---[ \t]*\r?(?:\n|\Z)", re.MULTILINE)
OUTPUT_COLUMNS = ("output", "completion")


@dataclass(frozen=True)
class RenderedPrompts:
    """Prompts, what to call each in messages (``"prompts.jsonl:3"``), and the gold outputs if the file has them."""

    prompts: tuple[Prompt, ...]
    names: tuple[str, ...]
    outputs: tuple[str, ...] | None


def infer_file(path: Path) -> Inferred:
    """The template and the rows of a file of rendered prompts.

    Raises:
        InputError: what :func:`read_rendered` and :func:`kvopt.task.infer.infer_template` refuse.
    """
    rendered = read_rendered(path)
    return replace(infer_template(rendered.prompts, rendered.names), outputs=rendered.outputs)


def read_rendered(path: Path) -> RenderedPrompts:
    """Read a file of rendered prompts.

    Args:
        path: rows with ``prompt`` (text or messages) or ``messages`` and, if they like, ``output`` or ``completion``
            (``.jsonl``, ``.json``, ``.csv``), or rows in the layouts of ShareGPT and Alpaca; a last message from the
            assistant is the output. Or a ``.txt`` file with prompts divided by lines ``---``; the line break before
            such a line is not part of the prompt.

    Raises:
        InputError: naming file and line of the first row that is no prompt, or lacks the output that others have.
    """
    if path.suffix.lower() == ".txt":
        prompts, names = _text_prompts(path)
        return RenderedPrompts(tuple(prompts), tuple(names), None)
    read = [_prompt(record) for record in read_records(path.name, path.parent, "train")]
    missing = [name for _, output, name in read if output is None]
    if missing and len(missing) < len(read):
        raise InputError("the row has no output, but others do", where=missing[0])
    outputs = None if missing or not read else tuple(output for _, output, _ in read if output is not None)
    return RenderedPrompts(tuple(prompt for prompt, _, _ in read), tuple(name for _, _, name in read), outputs)


def _text_prompts(path: Path) -> tuple[list[str], list[str]]:
    text = read_text(path)
    prompts, names, start = [], [], 0
    ends = [(match.start(), match.end()) for match in SEPARATOR.finditer(text)] + [(len(text), len(text))]
    for end, following in ends:
        piece = re.sub(r"\r?\n\Z", "", text[start:end])
        if piece.strip():
            prompts.append(piece)
            names.append(f"{path.name}:{text.count(chr(10), 0, start) + 1}")
        start = following
    return prompts, names


def _prompt(record: Record) -> tuple[Prompt, str | None, str]:
    fields, where = record.fields, record.where
    prompt: Any = fields.get("prompt", fields.get("messages"))
    if prompt is None and is_alpaca(fields):
        prompt = request(fields)
    output: Any = next((fields[name] for name in OUTPUT_COLUMNS if fields.get(name) is not None), None)
    if isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt):
        if prompt and prompt[-1].get("role") == "assistant" and output is None:
            output, prompt = prompt[-1].get("content"), prompt[:-1]
    elif not isinstance(prompt, str):
        raise InputError("the row has no prompt", where=where, fix="give prompt (text or messages) or messages")
    if isinstance(output, list) and output and isinstance(output[-1], dict):
        output = output[-1].get("content")
    try:
        return prompt, None if output is None else as_text(output, "the output"), where
    except NoValue as error:
        raise InputError(str(error), where=where) from None
