"""Where kvopt keeps what it learned of this machine: small JSON files in the user's cache, never beside the sources."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any


def user_file(name: str) -> Path:
    """``kernels/NAME`` in ``$KVOPT_CACHE``, ``$XDG_CACHE_HOME/kvopt`` or ``~/.cache/kvopt``; not created."""
    chosen = os.environ.get("KVOPT_CACHE")
    folder = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "kvopt"
    return folder.expanduser() / "kernels" / name


def read_mapping(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no file, and with a warning where it is damaged."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"{path} cannot be read and is not used ({error}); delete it", stacklevel=2)
        return {}
    if isinstance(value, dict):
        return value
    warnings.warn(f"{path} is no JSON object and is not used; delete it", stacklevel=2)
    return {}


def write_mapping(path: Path, value: dict[str, Any]) -> None:
    """Replace a file atomically. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=1) + "\n")
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
