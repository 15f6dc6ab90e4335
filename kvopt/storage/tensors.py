"""Safetensors files that say what they belong to: written atomically with one ``key`` in their header.

One entry alone, because the order of several is not fixed and the same content must give the same bytes.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kvopt.storage.files import write_bytes


def write_tensors(path: Path, tensors: dict[str, Tensor], key: str) -> None:
    """Replace ``path`` by these tensors (moved to the CPU)."""
    write_bytes(path, save({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, metadata={"key": key}))


def stored_key(path: Path) -> str | None:
    """The key of a file; None for no file, a damaged or truncated one, or one without a key."""
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            return (file.metadata() or {}).get("key")
    except (SafetensorError, OSError):
        return None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file."""
    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
