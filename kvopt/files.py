"""Writing and hashing files: everything is written beside its place, fsynced and renamed, so no reader sees half a
file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvopt.errors import InputError, KvoptError


def _raise_for(error: OSError, path: Path) -> None:
    if isinstance(error, PermissionError) or error.errno in (30,):  # EROFS
        raise InputError("no permission to write", where=str(path), mend="choose another --out folder") from error
    if error.errno in (28, 122):  # ENOSPC, EDQUOT
        raise KvoptError(
            f"{path}: the disk is full; nothing half-written was kept; free space and run again"
        ) from error
    raise error


def fsync_directory(directory: Path) -> None:
    """Flush a rename in ``directory`` to disk (no effect where directories cannot be opened)."""
    with contextlib.suppress(OSError):
        fd = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write_bytes(path: Path | str, data: bytes) -> None:
    """Replace ``path`` by ``data`` atomically; on failure the old file stays and nothing else does."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        fsync_directory(path.parent)
    except OSError as error:
        _raise_for(error, path)


def write_text(path: Path | str, text: str) -> None:
    """As :func:`write_bytes`, UTF-8, newlines unchanged."""
    write_bytes(path, text.encode("utf-8"))


def canonical_json(value: Any) -> str:
    """One spelling of a JSON value (sorted keys, no spaces), the form that hashes are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def write_json(path: Path | str, value: Any) -> None:
    """As :func:`write_bytes`: indented JSON with a final newline."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path | str, rows: list[Any]) -> None:
    """As :func:`write_bytes`: one JSON value a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


@contextlib.contextmanager
def replacing_directory(path: Path | str) -> Iterator[Path]:
    """Yield an empty folder beside ``path`` that takes its place when the block ends without an error."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    except OSError as error:
        _raise_for(error, path)
        raise
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        os.chmod(temporary, 0o755)
        if path.exists():
            old = temporary.with_name(temporary.name + ".old")
            os.rename(path, old)
            os.rename(temporary, path)
            shutil.rmtree(old)
        else:
            os.rename(temporary, path)
        fsync_directory(path.parent)
    except OSError as error:
        _raise_for(error, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_partials(directory: Path | str) -> None:
    """Delete what a killed process left half-written under ``directory``."""
    for leftover in Path(directory).rglob(".*.partial*"):
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def sha256_bytes(data: bytes) -> str:
    """Hex SHA-256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of the canonical JSON of ``value``."""
    return sha256_bytes(canonical_json(value).encode("utf-8"))


def sha256_file(path: Path | str) -> str:
    """Hex SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
