"""Reading, writing and hashing files. What a user gave is read with one line for each fault; everything is written
beside its place, fsynced and renamed, so no reader sees half a file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kvopt.errors import InputError, KvoptError
from kvopt.storage.locks import LockHeld, acquire_lock

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than this system allows",
}
_PLACE = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ENOENT, errno.ELOOP)

WRITING = ".writing"
"""A lock file in a folder that is not whole yet."""

REPLACED = ".old"
"""What the name of a folder ends in while another takes its place."""

LONG_NAME = 150
"""Bytes of a file's name, after which its half-written form has a hash in its place: names have at most 255."""

RELATIVE = "paths are relative to the config file"


def missing_file(path: Path, name: str | None = None, fix: str | None = None) -> InputError:
    """The error for a file that is not there: it says which folder was searched, where ``name`` (default: the path)
    does not.
    """
    name = str(path) if name is None else name
    folder = path.parent.resolve()
    searched = "" if Path(name).is_absolute() else f" in {folder}" if folder.is_dir() else f": there is no {folder}"
    return InputError(f"no such file{searched}", where=name, fix=fix)


def read_text(path: Path, fix: str | None = None) -> str:
    """A UTF-8 file, with or without a byte order mark, line endings kept. Raises InputError; ``fix`` is for a file
    that is not there.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise missing_file(path, fix=fix) from None
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8 text (at byte {error.start})", where=str(path)) from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", where=str(path)) from None


def parsed_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError for anything else, and for what is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError for anything else."""
    try:
        value = parsed_json(read_text(path))
    except ValueError as error:
        raise InputError(f"cannot be read as JSON: {error}", where=str(path)) from None
    if not isinstance(value, dict):
        raise InputError("is not a JSON object", where=str(path))
    return value


def read_record_file(path: Path, version: int) -> dict[str, Any] | None:
    """A JSON object that kvopt wrote about a folder, None where there is none. Raises InputError for a damaged one or
    one of another ``format_version``.
    """
    if not path.is_file():
        return None
    record = read_json(path)
    if (recorded := record.get("format_version")) != version:
        what = f"format version {recorded!r}, this kvopt reads {version}"
        raise InputError(what, where=str(path), fix="update kvopt")
    return record


def file_name(name: str) -> str:
    """A context's name as a file name."""
    return "".join(c if c.isalnum() or c in "-._" else "_" for c in name)


def write_error(error: OSError, path: Path | str) -> KvoptError:
    """What to raise for an error of the operating system while ``path`` was written: one line, never a traceback."""
    if error.errno in _FULL:
        return KvoptError(
            f"{path}: {_FULL[error.errno]}; nothing half-written was kept; free space and run the same command again"
        )
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return InputError("no permission to write", where=str(path), fix="choose another folder")
    reason = error.strerror or str(error)
    if error.errno in _PLACE:
        return InputError(f"cannot be written: {reason}", where=str(path), fix="choose another folder")
    return KvoptError(f"{path}: cannot be written: {reason}")


def fsync_directory(directory: Path) -> None:
    """Flush a rename in ``directory`` to disk (no effect where directories cannot be opened)."""
    with contextlib.suppress(OSError):
        fd = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write_bytes(path: Path | str, data: bytes) -> None:
    """Replace ``path`` by ``data`` atomically, as :func:`replacing_file`."""
    with replacing_file(path) as partial:
        partial.write_bytes(data)


@contextlib.contextmanager
def replacing_file(path: Path | str) -> Iterator[Path]:
    """An empty file to write, which replaces ``path`` atomically at the end of the block; on failure the old file stays
    and nothing else does. What a process of this machine that died left there for the same ``path`` is removed.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_partial_files(path)
        fd, name = tempfile.mkstemp(prefix=_partial_start(path, os.getpid()), suffix=".partial", dir=path.parent)
        try:
            os.close(fd)
            yield Path(name)
            with open(name, "rb+") as file:
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        fsync_directory(path.parent)
    except OSError as error:
        raise write_error(error, path) from error


def _partial_start(path: Path, process: int) -> str:
    """How the name of a half-written file for ``path`` begins: it tells who writes it, a process of which machine."""
    machine = hashlib.sha256(platform.node().encode()).hexdigest()[:6]
    name = path.name if len(path.name.encode()) <= LONG_NAME else sha256_bytes(path.name.encode())[:16]
    return f".{name}.{machine}-{process}-"


def _remove_partial_files(path: Path) -> None:
    """Delete half-written files for ``path`` whose writer, a process of this machine, is gone."""
    start = _partial_start(path, 0).removesuffix("0-")
    for child in path.parent.iterdir():
        if child.name.startswith(start) and child.name.endswith(".partial"):
            import psutil

            process = child.name.removeprefix(start).partition("-")[0]
            if process.isdecimal() and not psutil.pid_exists(int(process)):
                child.unlink(missing_ok=True)


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


def append_line(path: Path, line: str) -> None:
    """Add a line to a file and wait until it is on disk; on failure nothing of it is left. Raises KvoptError."""
    data = (line + "\n").encode("utf-8")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            start = file.seek(0, os.SEEK_END)
            try:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(start)
                raise
    except OSError as error:
        raise write_error(error, path) from error


def mend_last_line(path: Path) -> None:
    """Cut off the last line of a file of lines where a kill left half of it."""
    if path.is_file() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


@contextlib.contextmanager
def replacing_directory(path: Path | str) -> Iterator[Path]:
    """Yield an empty folder beside ``path`` that takes its place when the block ends without an error. What a killed
    process left there for the same ``path`` is removed first.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    except OSError as error:
        raise write_error(error, path) from error
    try:
        with _being_written(temporary):
            yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        os.chmod(temporary, 0o755)
        _put_in_place(temporary, path)
        fsync_directory(path.parent)
    except OSError as error:
        raise write_error(error, path) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _being_written(folder: Path) -> Iterator[None]:
    """Hold a lock that tells a folder in work from a leftover; without effect where the file system has no locks."""
    try:
        lock = acquire_lock(folder / WRITING, wait=False)
    except InputError:
        lock = contextlib.nullcontext()
    try:
        with lock:
            yield
    finally:
        (folder / WRITING).unlink(missing_ok=True)


def _remove_leftovers(path: Path) -> None:
    """Delete the half-written folders for ``path`` that no process is writing."""
    ours = re.compile(rf"\.{re.escape(path.name)}\.[^.]+\.partial(\.old)?")
    for leftover in [child for child in path.parent.iterdir() if ours.fullmatch(child.name) and child.is_dir()]:
        if leftover.name.endswith(REPLACED) and not path.exists():
            os.rename(leftover, path)  # the process died between two renames
            continue
        with contextlib.suppress(LockHeld, InputError, OSError):
            with acquire_lock(leftover / WRITING, wait=False):
                pass
            shutil.rmtree(leftover)


def _put_in_place(temporary: Path, path: Path) -> None:
    """Rename a folder to ``path``; what was there before goes, or comes back when the rename fails."""
    if not path.exists():
        os.rename(temporary, path)
        return
    old = temporary.with_name(temporary.name + REPLACED)
    os.rename(path, old)
    try:
        os.rename(temporary, path)
    except OSError:
        os.rename(old, path)
        raise
    shutil.rmtree(old)


def remove_partials(directory: Path | str) -> None:
    """Delete what a killed process left half-written under ``directory``; a folder that was about to be replaced is put
    back.
    """
    for leftover in list(Path(directory).rglob(".*.partial*")):
        replaced = re.fullmatch(r"\.(.+)\.[^.]+\.partial" + re.escape(REPLACED), leftover.name)
        if replaced and not (place := leftover.with_name(replaced[1])).exists():
            os.rename(leftover, place)
            continue
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def sha256_bytes(data: bytes) -> str:
    """Hex SHA-256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of the canonical JSON of ``value``; damaged text, such as half of a surrogate pair, has one too."""
    return sha256_bytes(canonical_json(value).encode("utf-8", "surrogatepass"))


CHECKSUM = "checksum"
"""The entry of a JSON object that is a hash of all others."""

CHANGED = "is damaged: its content is not what was written"
"""What is said of a file that does not fit its hash."""


def with_checksum(value: dict[str, Any]) -> dict[str, Any]:
    """The object, with a hash of its entries as the last one."""
    rest = {name: entry for name, entry in value.items() if name != CHECKSUM}
    return rest | {CHECKSUM: sha256_json(rest)}


def fits_checksum(value: dict[str, Any]) -> bool:
    """Whether an object's entries are those that :func:`with_checksum` saw. One without a hash, which older versions
    wrote, is taken as it is.
    """
    return CHECKSUM not in value or with_checksum(value)[CHECKSUM] == value[CHECKSUM]


def key_of(version: int, parts: Sequence[Any]) -> str:
    """As :func:`sha256_json`, of what a result depends on and the version of the code that computes it. The first
    version adds nothing, so results from before keys had versions keep theirs.
    """
    return sha256_json([*parts, {"version": version}] if version > 1 else list(parts))


def sha256_file(path: Path | str) -> str:
    """Hex SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
