"""Safetensors files that say what they belong to and whether they are as they were written: a ``key`` and a ``sha256``
of their tensors in the header. Files of older versions have no ``sha256``, and are taken as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvopt.errors import InputError
from kvopt.storage.files import CHANGED, canonical_json, parsed_json, replacing_file

FACTS = "__metadata__"
BLOCK = 1 << 22
"""Bytes that are hashed at once."""
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls the types that kvopt stores."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], key: str) -> None:
    """Replace ``path`` by these tensors (moved to the CPU); they are written from where they are, without a copy. The
    same content gives the same bytes.

    The header is put together here, because the library writes several entries of metadata in no fixed order.
    """
    on_cpu = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    table: dict[str, Any] = {}
    end = 0
    for name in sorted(on_cpu, key=lambda name: (-on_cpu[name].element_size(), name)):
        start, end = end, end + on_cpu[name].nbytes
        table[name] = {
            "dtype": NAMES[on_cpu[name].dtype],
            "shape": list(on_cpu[name].shape),
            "data_offsets": [start, end],
        }
    parts = [memoryview(on_cpu[name].reshape(-1).view(torch.uint8).numpy()) for name in table]
    digest = _begun(table)
    for part in parts:
        digest.update(part)
    with replacing_file(path) as partial, partial.open("wb") as file:
        file.write(header_of({FACTS: {"key": key, "sha256": digest.hexdigest()}} | table))
        for part in parts:
            file.write(part)


def header_of(table: Mapping[str, Any]) -> bytes:
    """The bytes of a safetensors file before its tensors; the same table in the same order gives the same."""
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # tensors are read in place, so they begin at a multiple of 8
    return len(header).to_bytes(8, "little") + header


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
