"""``kvopt init``: a commented starter config, or one recovered from rendered prompts."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import yaml

from kvopt.errors import InputError
from kvopt.storage.files import write_bytes, write_jsonl, write_text
from kvopt.task.rendered_prompts import infer_file

CONFIG = "kvopt.yaml"


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


def write_inferred(prompts: Path, folder: Path, force: bool = False) -> list[Path]:
    """Recover template and slot values from a file of rendered prompts; write config and data.

    Raises InputError when they cannot be recovered, with the residue that did not fit.
    """
    inferred = infer_file(prompts)
    _check_free(folder, (CONFIG, "train.jsonl"), force)
    config = {
        "name": re.sub(r"[^A-Za-z0-9._-]+", "-", prompts.stem).strip("-._") or "run",
        "template": inferred.template.to_json(),
        "data": {"train": "train.jsonl", "output": "output"},
    }
    write_jsonl(folder / "train.jsonl", inferred.rows())
    notes = [f"the template is {inferred.coverage:.0%} of the prompts' text; slots are the rest", *inferred.notes]
    if inferred.outputs is None:
        notes.append('train.jsonl has no outputs yet: add an "output" to every row')
    note = "".join(f"# {line}\n" for line in notes)
    write_text(folder / CONFIG, note + yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
    return [folder / CONFIG, folder / "train.jsonl"]


def _check_free(folder: Path, names: object, force: bool) -> None:
    for name in names:  # type: ignore[attr-defined]
        if (folder / name).exists() and not force:
            raise InputError("already exists", where=str(folder / name), fix="choose another folder, or --force")
