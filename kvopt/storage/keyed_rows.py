"""Files of answers and the like: one JSON object a row, each with the key of what it depends on, so that a
file says by itself whether it is still good. They are written whole or not at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvopt.storage.files import parsed_json, write_jsonl

KEY = "key"


def stored_rows(path: Path, key: str, count: int) -> list[dict[str, Any]] | None:
    """The rows of a file that belongs to ``key`` and has ``count`` rows; None for any other, or none."""
    try:
        text = path.read_bytes().decode("utf-8")
        rows = [parsed_json(line) for line in text.split("\n")[:-1]]  # answers may hold other ends of lines
    except (OSError, ValueError):
        return None
    if len(rows) != count or any(not isinstance(row, dict) or row.get(KEY) != key for row in rows):
        return None
    return rows


def key_of_rows(path: Path) -> str | None:
    """The key that a file belongs to; None for no file, or a damaged one."""
    try:
        with path.open(encoding="utf-8") as file:
            row = parsed_json(file.readline())
    except (OSError, ValueError):
        return None
    key = row.get(KEY) if isinstance(row, dict) else None
    return key if isinstance(key, str) else None


def write_rows(path: Path, key: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Store rows under ``key``; returns them as :func:`stored_rows` would."""
    keyed = [{KEY: key, **row} for row in rows]
    write_jsonl(path, keyed)
    return keyed
