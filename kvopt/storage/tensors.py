"""Safetensors files that say what they belong to: written atomically with one ``key`` in their header.

One entry alone, because the order of several is not fixed and the same content must give the same bytes.
"""

from __future__ import annotations

import errno
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvopt.storage.files import replacing_file


def write_tensors(path: Path, tensors: dict[str, Tensor], key: str) -> None:
    """Replace ``path`` by these tensors (moved to the CPU); they are written from where they are, without a copy."""
    on_cpu = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with replacing_file(path) as partial:
        try:
            save_file(on_cpu, partial, metadata={"key": key})
        except SafetensorError as error:  # what safetensors makes of a full disk
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error


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
