"""Results that took time and are not wanted now: nothing is deleted, all of it goes to ``.kept/NAME-HASH/``.

Every stage asks here (through :class:`kvopt.run.directory.RunDirectory`) before it works: what belongs to another key
is put aside, what belongs to the key that is asked for is taken up again. ``kvopt clean`` alone removes any of it. Each
step is one rename, in an order that a process killed between two of them is continued by the next.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from kvopt.documents.kept_file import KeptRecord
from kvopt.documents.validated import read_document
from kvopt.storage.files import file_name, fsync_directory, parsed_json, sha256_json, write_error, write_json

FOLDER = ".kept"
RECORD = "kept.json"
RECORDS = ("kvopt.json", "kvopt-student.json")
"""Files in which a folder says what it depends on."""
OWN = ("key", "content_sha256", "weights_sha256")
HASH_DIGITS = 12
CHANGED = "what it depends on changed"
UNNAMED = "the config does not name it"


@dataclass(frozen=True)
class KeptResult:
    """A result in ``.kept``: its folder there, and what its record says."""

    folder: Path
    record: KeptRecord

    @property
    def paths(self) -> list[str]:
        """Its files and folders that are there, relative to the run directory."""
        return [path for path in self.record.paths if (self.folder / path).exists()]

    @property
    def bytes(self) -> int:
        """How much it takes on disk."""
        return size_on_disk(self.folder)


@dataclass(frozen=True)
class Kept:
    """What one run directory has put aside.

    Args:
        root: the run directory.
        say: gets a line for what is moved.
    """

    root: Path
    say: Callable[[str], None] = field(default=lambda line: None)
    _told: set[tuple[str, str]] = field(default_factory=set)

    @property
    def folder(self) -> Path:
        return self.root / FOLDER

    def results(self) -> list[KeptResult]:
        """Everything that is put aside, by name. Raises InputError for a damaged record."""
        found = []
        for path in sorted(self.folder.glob(f"*/{RECORD}")):
            result = KeptResult(path.parent, read_document(KeptRecord, path, "is damaged; delete its folder"))
            if result.paths:
                found.append(result)
        return found

    def exchange(self, stage: str, key: str, before: str | None, paths: Sequence[str]) -> None:
        """Put aside what stands at ``paths`` unless it belongs to ``key``, and take up what belongs to it.

        Args:
            before: the key of what stands there now; None where only the files themselves can say.
        """
        if before != key:
            self.put_aside(stage, before, paths, unless=key)
        self.take_up(stage, key)

    def put_aside(
        self, stage: str, key: str | None, paths: Sequence[str], *, unless: str | None = None, why: str = CHANGED
    ) -> bool:
        """Move what stands at ``paths``; whether there was anything. ``unless``: a key under which it stays.

        Raises:
            KvoptError: it cannot be moved.
        """
        there = [path for path in paths if (self.root / path).exists()]
        if not there:
            return False
        key = key or own_key(self.root / there[0])
        if key == unless:
            return False
        place = next(place for place in self._places(stage, key) if not any((place / path).exists() for path in there))
        try:
            record = KeptRecord(format_version=1, stage=stage, key=key, why=why, paths=list(paths))
            write_json(place / RECORD, record.to_json())
            for path in there:
                _move(self.root / path, place / path)
        except OSError as error:
            raise write_error(error, place) from error
        self._tell("put aside", stage, f"in {place.relative_to(self.root)} ({why}; kvopt clean deletes it)")
        return True

    def take_up(self, stage: str, key: str) -> None:
        """Move what belongs to ``key`` back to where it was; what has been made again in the meantime stays."""
        place = next(iter(self._places(stage, key)))
        record_file = place / RECORD
        if not record_file.is_file():
            return
        result = KeptResult(place, read_document(KeptRecord, record_file, "is damaged; delete its folder"))
        try:
            moved = [path for path in result.paths if not (self.root / path).exists()]
            for path in moved:
                _move(place / path, self.root / path)
        except OSError as error:
            raise write_error(error, place) from error
        if not result.paths:
            shutil.rmtree(place)
            with suppress(OSError):
                self.folder.rmdir()
        if moved:
            self._tell("taken up again", stage, f"from {place.relative_to(self.root)}")

    def remove(self, result: KeptResult) -> None:
        """Delete one result for good."""
        try:
            shutil.rmtree(result.folder)
        except OSError as error:
            raise write_error(error, result.folder) from error
        with suppress(OSError):
            self.folder.rmdir()

    def _places(self, stage: str, key: str) -> Iterator[Path]:
        """``NAME-HASH``, and where that is taken ``NAME-HASH-2``, …"""
        name = f"{file_name(stage.replace('/', '-'))}-{file_name(key)[:HASH_DIGITS]}"
        yield self.folder / name
        yield from (self.folder / f"{name}-{number}" for number in count(2))

    def _tell(self, what: str, stage: str, where: str) -> None:
        """One line for a result; of many files in one folder, for the first one."""
        together = stage.rpartition("/")[0] if "." in stage else stage
        if (what, together) not in self._told:
            self._told.add((what, together))
            self.say(f"{what}: {stage}, {where}")


def own_key(path: Path) -> str:
    """What a result says of what it depends on; where it says nothing, a hash of its files' names and sizes."""
    for record in [path / name for name in RECORDS] if path.is_dir() else [path]:
        with suppress(OSError, ValueError):
            text = record.read_text("utf-8")
            value = parsed_json(text.partition("\n")[0] if path.suffix == ".jsonl" else text)
            if isinstance(value, dict) and (own := next((value[name] for name in OWN if value.get(name)), None)):
                return str(own)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return sha256_json([[str(file.relative_to(path)), file.stat().st_size] for file in files if file.is_file()])


def size_on_disk(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.rename(source, target)
    fsync_directory(target.parent)
    fsync_directory(source.parent)
