"""Files of answers and the like: one JSON object a row, each with the key of what it depends on, so that a
file says by itself whether it is still good, and a checksum. They are written whole or not at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvopt.storage.files import CHECKSUM, fits_checksum, parsed_json, with_checksum, write_jsonl

KEY = "key"


def stored_rows(path: Path, key: str, count: int) -> list[dict[str, Any]] | None:
    """The rows of a file that belongs to ``key``, has ``count`` rows and is whole; None for any other, or none."""
    try:
        text = path.read_bytes().decode("utf-8")
        rows = [parsed_json(line) for line in text.split("\n")[:-1]]  # answers may hold other ends of lines
    except (OSError, ValueError):
        return None
    if len(rows) != count or any(not isinstance(row, dict) or row.get(KEY) != key for row in rows):
        return None
    if not all(map(fits_checksum, rows)):
        return None
    return [{name: value for name, value in row.items() if name != CHECKSUM} for row in rows]


def are_damaged(path: Path) -> bool:
    """Whether a file has a row that is not as it was written."""
    try:
        rows = [parsed_json(line) for line in path.read_bytes().decode("utf-8").split("\n")[:-1]]
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True
    return not all(isinstance(row, dict) and fits_checksum(row) for row in rows)


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
    write_jsonl(path, [with_checksum(row) for row in keyed])
    return keyed
