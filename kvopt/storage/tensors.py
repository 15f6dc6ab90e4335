"""Safetensors files that say what they belong to and whether they are as they were written: a ``key`` and a ``sha256``
of their tensors in the header. Files of older versions have no ``sha256``, and are taken as they are.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kvopt.errors import InputError
from kvopt.storage.files import CHANGED, canonical_json, parsed_json, write_bytes

FACTS = "__metadata__"
BLOCK = 1 << 22
"""Bytes that are hashed at once."""


def write_tensors(path: Path, tensors: dict[str, Tensor], key: str) -> None:
    """Replace ``path`` by these tensors (moved to the CPU). The same content gives the same bytes."""
    data = memoryview(save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}))
    start = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(bytes(data[8:start]))
    digest = _begun(table)
    digest.update(data[start:])
    # the library writes several entries in no fixed order
    header = json.dumps({FACTS: {"key": key, "sha256": digest.hexdigest()}} | table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors are read in place, so they begin at a multiple of 8
    write_bytes(path, b"".join([len(header).to_bytes(8, "little"), header, data[start:]]))


def stored_key(path: Path) -> str | None:
    """The key of a file; None for no file, a truncated one, or one without a key. The tensors are not looked at."""
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            return (file.metadata() or {}).get("key")
    except (SafetensorError, OSError):
        return None


def check_tensors(path: Path) -> None:
    """Read a file once, from the beginning to the end. Raises InputError where it is not as it was written."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            table = parsed_json(file.read(length)) if length < path.stat().st_size else None
            facts = table.pop(FACTS, {}) if isinstance(table, dict) else None
            if not isinstance(facts, dict):
                raise damaged(path, ": its header cannot be read")
            if facts.keys() <= {"key"}:
                return
            digest = _begun(table)
            while block := file.read(BLOCK):
                digest.update(block)
    except (OSError, ValueError) as error:
        raise damaged(path, f": {error}") from None
    if digest.hexdigest() != facts.get("sha256"):
        raise damaged(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file. Raises InputError where it is not as it was written."""
    check_tensors(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise damaged(path, f": {error}") from None


def damaged(path: Path, how: str = "") -> InputError:
    """The error for a file that is not as it was written."""
    what = f"is damaged{how}" if how else CHANGED
    return InputError(what, where=str(path), fix="delete it; kvopt makes it again")


def _begun(table: Any) -> Any:
    """A hash that has taken in the names, types and shapes of tensors, and where they lie."""
    return hashlib.sha256(canonical_json(table).encode("utf-8", "surrogatepass"))
