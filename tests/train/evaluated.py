"""A small job with everything that an evaluation looks at: held-out mutations, templates, probes, a learned context,
and a student. A whole evaluation of base and student takes about two seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvopt.config.document import load_config
from kvopt.run.run import Run
from tests.jobs import write_job, write_rows

TEMPLATES = """
- name: terse
  text: Label?
- name: whole
  text: "Sort this into weather, music or book: {{text}}"
"""
WORDS = ("rain", "snow", "wind", "a song", "six points", "the list")


def write_evaluated(folder: Path, change: Callable[[dict[str, Any]], object] | None = None) -> Path:
    """Write config, data, templates and probes into ``folder``; return the config's path."""

    def everything(config: dict[str, Any]) -> None:
        config["mutations"]["count"] = 6
        config["contexts"] = [{**config["contexts"][0], "steps": 2}]
        config["evaluate"] = {
            "rows": 4, "max_new_tokens": 6, "batch_size": 4, "metrics": ["exact-match", "rouge-l"], "resamples": 200,
            "held_out_mutations": 2, "templates": "templates.yaml", "probes": {"file": "probes.jsonl"},
            "frozen": {"rows": 2, "instructions": ["Count the words.", "Say hello."]},
        }  # fmt: skip
        config["students"] = [student("s1", "original", "best-mutations:2")]
        config["students"].append(student("s2", "original", method="full"))  # its head is another than the base's
        if change:
            change(config)

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "templates.yaml").write_text(TEMPLATES, "utf-8")
    write_rows(folder / "probes.jsonl", [{"prompt": f"Say {word}.", "output": word} for word in WORDS])
    return write_job(folder, everything)


def student(name: str, *contexts: str, **settings: Any) -> dict[str, Any]:
    """A student of three steps that really moves."""
    made = {"name": name, "contexts": list(contexts), "steps": 3, "batch_size": 4, "learning_rate": 0.01}
    return made | {"report_to": []} | settings


def open_evaluated(config: Path, out: Path, sets: tuple[str, ...] = ()) -> Run:
    """The run of a config, to be opened; its lines are kept in ``run.lines``."""
    loaded, base_dir = load_config(config, sets)
    lines: list[str] = []
    run = Run(loaded, base_dir, out, say=lines.append, bars=False)
    run.lines = lines  # type: ignore[attr-defined]
    return run
