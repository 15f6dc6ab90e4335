"""``kvopt init``: a commented starter config, or one recovered from rendered prompts."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path

import yaml

from kvopt.errors import InputError
from kvopt.storage.files import write_bytes, write_jsonl, write_text
from kvopt.task.rendered_prompts import infer_file
from kvopt.task.template import Static, Template, parse

CONFIG = "kvopt.yaml"
CHARACTERS = 8
"""Characters of text that hold a token for sure: a context must not have more slots than its template has tokens."""

MESSAGES = r"^  messages:\n(?:(?: .*)?\n)+?(?=# )"
"""The messages of the starter config, up to the next comment."""


def write_starter(folder: Path, force: bool = False) -> list[Path]:
    """Copy the starter config and its small data files. Raises InputError when a file is there and ``force`` is not
    set.
    """
    source = resources.files("kvopt") / "configs"
    files = {CONFIG: (source / "template.yaml").read_bytes()}
    files |= {f"{part}.jsonl": (source / f"template-{part}.jsonl").read_bytes() for part in ("train", "validation")}
    _check_free(folder, files, force)
    for name, data in files.items():
        write_bytes(folder / name, data)
    return [folder / name for name in files]


def write_inferred(prompts: Path, folder: Path, force: bool = False) -> tuple[list[Path], list[str]]:
    """Recover template and slot values from a file of rendered prompts; write config and data. Returns the files, and
    what a person should look at.

    Raises InputError when they cannot be recovered, with the residue that did not fit.
    """
    inferred = infer_file(prompts)
    _check_free(folder, (CONFIG, "train.jsonl"), force)
    rows = inferred.rows()
    notes = list(inferred.notes)
    if inferred.outputs is None:
        notes.append('train.jsonl has no outputs yet: add an "output" to every row')
    text = (resources.files("kvopt") / "configs" / "template.yaml").read_text("utf-8")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", prompts.stem).strip("-._") or "run"
    header = f"# The template is {inferred.coverage:.0%} of the prompts' text; slots are the rest.\n"
    write_jsonl(folder / "train.jsonl", rows)
    write_text(folder / CONFIG, header + _adapted(text, name, inferred.template, len(rows)))
    return [folder / CONFIG, folder / "train.jsonl"], notes


def _adapted(text: str, name: str, template: Template, rows: int) -> str:
    """The starter config with its comments, for another template and so many rows."""
    told = yaml.dump(template.to_json(), Dumper=_Readable, sort_keys=False, allow_unicode=True, width=10**6)
    leading, static = _static_characters(template)
    slots = max(2, min(32, (leading or static) // CHARACTERS))
    without = "without this file, some of train are set aside"
    changes = {
        r"^name: \S+": f"name: {json.dumps(name)}",
        MESSAGES: "".join(f"  {line}\n" if line else "\n" for line in told.splitlines()) + "\n",
        r"^  validation: \S+ +#.*": f"  validation: null                 # {without}",
        r"^    selection: \S+": f"    selection: {max(1, min(32, rows // 5))}",
        r"^    tokens: 32": f"    tokens: {slots:<2}",
        r"kv-32": f"kv-{slots}",
    }
    if not leading:
        changes[r"^  scope: leading"] = "  scope: all    "
    for pattern, value in changes.items():
        text, count = re.subn(pattern, lambda _, value=value: value, text, flags=re.MULTILINE)  # type: ignore[misc]
        assert count, f"the starter config has nothing like {pattern}"
    return text


def _static_characters(template: Template) -> tuple[int, int]:
    """Characters of static text: before the first slot, and all of them."""
    parts = [part for field in template.fields for part in parse(field)]
    lengths = [len(part.text) if isinstance(part, Static) else None for part in parts]
    first = lengths.index(None) if None in lengths else len(lengths)
    return sum(length or 0 for length in lengths[:first]), sum(length or 0 for length in lengths)


class _Readable(yaml.SafeDumper):
    """Writes texts of several lines as such."""


def _text_node(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Readable.add_representer(str, _text_node)


def _check_free(folder: Path, names: object, force: bool) -> None:
    for name in names:  # type: ignore[attr-defined]
        if (folder / name).exists() and not force:
            raise InputError("already exists", where=str(folder / name), fix="choose another folder, or --force")
