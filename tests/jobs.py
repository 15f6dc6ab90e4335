"""A small but whole job in a folder: a tiny base, twenty rows, and a config with mutations and three learned contexts.
A run takes about a second.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from kvopt.config.document import load_config
from kvopt.run.run import Run
from tests.tiny import tiny_folder

THINGS = ["rain", "snow", "a song", "two books", "the album", "a table", "wind", "six points", "a novel", "the list"]
VERBS = ["Tell me about", "Please find"]
SYSTEM = (
    "You are a careful assistant. Sort the message into one of the labels below.\n\n"
    "## Rules\n- Read the request twice.\n- Answer in one short line.\n- Do not explain the answer.\n\n"
    "Labels: weather, music, book."
)
PLACE = re.compile(rb'"config_folder": "[^"]*",?|"checksum": "[0-9a-f]+"')
NOT_COMPARED = ("ledger.jsonl", ".lock", "report.html")


def rows(count: int = 20) -> list[dict[str, str]]:
    """Different messages, each with a label that depends on it."""
    messages = [f"{verb} {thing}." for verb in VERBS for thing in THINGS][:count]
    return [{"text": text, "output": ("weather", "music", "book")[len(text) % 3]} for text in messages]


def settings(base: str) -> dict[str, Any]:
    """The job's config."""
    return {
        "name": "job",
        "model": {"base": base, "dtype": "float32", "device": "cpu"},
        "template": {
            "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Message: {{text}}"}]
        },
        "data": {
            "train": "train.jsonl",
            "validation": "validation.jsonl",
            "limit": {"selection": 4},
        },
        "reference": {"batch_size": 4},
        "mutations": {"count": 3, "operators": ["structure", "syntax", "lexical"], "generator": {"kind": "none"}},
        "score": {"batch_size": 4, "resamples": 200, "best": 2},
        "report": {"max_new_tokens": 3},
        "contexts": [
            {
                "name": "kv-8",
                "kind": "kv",
                "tokens": 8,
                "init": "strided",
                "steps": 6,
                "batch_size": 4,
                "eval_every": 2,
            },
            {"name": "kv-best", "kind": "kv", "init": "best-mutation", "steps": 3, "batch_size": 4, "eval_every": 2},
            {
                "name": "soft-6",
                "kind": "soft",
                "tokens": 6,
                "init": "template",
                "steps": 3,
                "batch_size": 4,
                "eval_every": 2,
            },
        ],
    }


def write_job(folder: Path, change: Callable[[dict[str, Any]], object] | None = None) -> Path:
    """Write data and config into ``folder`` (``change`` may edit the config first) and return the config's path."""
    folder.mkdir(parents=True, exist_ok=True)
    config = settings(str(tiny_folder("llama")))
    if change:
        change(config)
    write_rows(folder / "train.jsonl", rows()[:14])
    write_rows(folder / "validation.jsonl", rows()[14:])
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), "utf-8")
    return path


def write_rows(path: Path, values: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), "utf-8")


def entries(path: Path) -> dict[str, Any]:
    """The entries of a document in a run directory, without the checksum of the file."""
    return {name: value for name, value in json.loads(path.read_text("utf-8")).items() if name != "checksum"}


def run_job(config: Path, out: Path, sets: tuple[str, ...] = ()) -> dict[str, Any]:
    """All stages in this process; returns the leaderboard."""
    loaded, base_dir = load_config(config, sets)
    with Run(loaded, base_dir, out, say=lambda line: None, bars=False).opened() as run:
        return run.run().to_json()


def artefacts(out: Path) -> dict[str, bytes]:
    """The bytes of every file of a run but those that hold times, and those that are put aside; of the manifest without
    the way from the run to its config, which is another for a copy.
    """
    files = (path for path in sorted(out.rglob("*")) if path.is_file() and ".kept" not in path.parts)
    found = {str(p.relative_to(out)): p.read_bytes() for p in files if p.name not in NOT_COMPARED}
    if "manifest.json" in found:
        found["manifest.json"] = PLACE.sub(b"", found["manifest.json"])
    return found


def stages_in(out: Path) -> list[str]:
    """The stages that did work, in the ledger's order."""
    return [json.loads(line)["stage"] for line in (out / "ledger.jsonl").read_text("utf-8").splitlines()]
