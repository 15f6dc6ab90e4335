"""Results of ``tools/gpu_check.sh``: a JSON file and a Markdown table for each part, rewritten after every item.

A part that is killed half way so leaves what it had. Needs the standard library alone, and works where torch fails.

    python tools/gpu_report.py wanted OUT PART SIZE DEVICE    exit code 0 where the part has to run, else 1
    python tools/gpu_report.py killed OUT PART SIZE DEVICE REASON      notes that a part did not end by itself
    python tools/gpu_report.py summary OUT PART ...           prints the last lines; exit code 1 where anything failed
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    "kernels",
    "kvopt",
    "tests/gpu",
    "tests/kernels/cases.py",
    "tests/tasks.py",
    "tests/tiny.py",
    "tools",
    "train",
)


class Part:
    """What a part has found so far; ``facts`` is its JSON document.

    Args:
        out: the folder of results.
        name: tests, kernels, attention or steps.
        size: "full" or "small". device: "cuda" or "cpu".
        columns: title of each column of the table, and the key of an item that it shows.
        title: the table's heading; ``notes`` are lines below it.
    """

    def __init__(
        self,
        out: Path,
        name: str,
        size: str,
        device: str,
        columns: dict[str, str] | None = None,
        title: str = "",
        notes: list[str] | None = None,
    ) -> None:
        self.out, self.name, self.begun = out, name, time.monotonic()
        self.facts: dict[str, Any] = {
            "part": name,
            "title": title or name,
            "notes": notes or [],
            "columns": columns or {"item": "name", "result": "result"},
            "commit": commit(),
            "sources": sources_sha256(),
            "size": size,
            "device": device,
            "complete": False,
            "failed": 0,
            "seconds": 0.0,
            "environment": {},
            "items": [],
        }

    @classmethod
    def reopened(cls, out: Path, name: str, size: str, device: str) -> Part:
        """The part as its file has it, a new one without a file."""
        part, facts = cls(out, name, size, device), stored(out, name)
        if facts is not None:
            part.facts, part.begun = facts, time.monotonic() - facts["seconds"]
        return part

    def add(self, item: dict[str, Any], failed: bool = False) -> None:
        """Note one result and write both files; ``failed`` items make the check fail."""
        self.facts["items"].append(item | ({"failed": True} if failed else {}))
        self.facts["failed"] += failed
        self.write()
        shown = "  ".join(_shown(item.get(key)) for key in self.facts["columns"].values())
        print(f"{self.name}: {'FAILED ' if failed else ''}{shown}", flush=True)

    def finish(self) -> int:
        """Everything was measured; returns the exit code."""
        self.facts["complete"] = True
        self.write()
        return 1 if self.facts["failed"] else 0

    def write(self) -> None:
        self.facts["seconds"] = round(time.monotonic() - self.begun, 1)
        self.out.mkdir(parents=True, exist_ok=True)
        _replace(self.out / f"{self.name}.json", json.dumps(self.facts, indent=1) + "\n")
        _replace(self.out / f"{self.name}.md", self.markdown())

    def markdown(self) -> str:
        """The table, ready for a document."""
        facts, columns = self.facts, self.facts["columns"]
        where = ", ".join(f"{key} {value}" for key, value in facts["environment"].items())
        state = "complete" if facts["complete"] else f"not complete ({facts.get('ended', 'running')})"
        lines = [
            f"## {facts['title']}",
            f"{where or facts['device']}; {facts['size']} sizes; commit {facts['commit']}; {state},"
            f" {facts['failed']} failed, {facts['seconds']:.0f} s.",
            *facts["notes"],
            "",
            "| " + " | ".join(columns) + " |",
            "|---" * len(columns) + "|",
        ]
        for item in facts["items"]:
            cells = (_shown(item.get(key)).replace("|", "\\|") for key in columns.values())
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())


def _replace(path: Path, text: str) -> None:
    """Write whole or not at all."""
    temporary = path.with_suffix(path.suffix + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def commit() -> str:
    """The checkout's commit, "unknown" where there is no git."""
    try:
        command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else "unknown"


def sources_sha256() -> str:
    """Hash of what the check runs, whether it is committed or not: results of other sources are not taken for these."""
    digest = hashlib.sha256()
    for name in SOURCES:
        place = ROOT / name
        files = [place] if place.is_file() else sorted(place.rglob("*.py")) + sorted(place.rglob("*.sh"))
        for file in files:
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def stored(out: Path, part: str) -> dict[str, Any] | None:
    """The facts of a part's JSON file, None without a readable one."""
    try:
        facts = json.loads((out / f"{part}.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None


def is_done(out: Path, part: str, size: str, device: str) -> bool:
    """Whether the part was measured to its end, with these sources, sizes and kind of device."""
    facts = stored(out, part)
    wanted = {"complete": True, "sources": sources_sha256(), "size": size, "device": device}
    return facts is not None and all(facts.get(key) == value for key, value in wanted.items())


def note_killed(out: Path, part: str, size: str, device: str, reason: str) -> None:
    """Say in the files of a part that it did not end by itself."""
    killed = Part.reopened(out, part, size, device)
    if not killed.facts["complete"]:
        killed.facts["ended"] = reason
        killed.facts["failed"] += 1
        killed.write()


def summary(out: Path, parts: list[str]) -> tuple[str, int]:
    """The last lines to print, and the exit code."""
    lines, code = [f"{'part':8s} {'state':14s} {'items':>5s} {'failed':>6s} {'seconds':>7s}  where"], 0
    for part in parts:
        facts = stored(out, part)
        if facts is None:
            lines.append(f"{part:8s} {'no result':14s} {'–':>5s} {'–':>6s} {'–':>7s}")
            code = 1
            continue
        state = "complete" if facts["complete"] else "not complete"
        name = facts["environment"].get("device", facts["device"])
        lines.append(
            f"{part:8s} {state:14s} {len(facts['items']):5d} {facts['failed']:6d} {facts['seconds']:7.0f}"
            f"  {name}, {facts['size']} sizes" + (f" ({facts['ended']})" if "ended" in facts else "")
        )
        code = code or int(not facts["complete"] or facts["failed"] > 0)
    return "\n".join(lines), code


def main(arguments: list[str]) -> int:
    command, out, *rest = arguments
    if command == "wanted":
        return 0 if not is_done(Path(out), *rest) else 1
    if command == "killed":
        note_killed(Path(out), *rest)
        return 0
    text, code = summary(Path(out), rest)
    print(text)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
