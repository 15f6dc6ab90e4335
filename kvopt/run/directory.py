"""The run directory: manifest, ledger, lock, and the rule that a stage whose inputs did not change is not run again.

Everything in it but ``ledger.jsonl`` and ``report.*`` (which hold times) is a function of the inputs, so an interrupted
run that is continued ends in the same bytes as one that was not.
"""

from __future__ import annotations

import contextlib
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from kvopt.base.devices import is_out_of_memory
from kvopt.console.progress import Progress
from kvopt.documents.ledger import LedgerEntry
from kvopt.documents.manifest import RunManifest
from kvopt.documents.validated import first_fault, unchecked, write_document
from kvopt.errors import InputError, KvoptError
from kvopt.kernels.memory import peak, what_is_counted
from kvopt.run.out_of_memory import out_of_memory
from kvopt.run.put_aside import UNNAMED, Kept
from kvopt.storage.files import (
    CHANGED,
    append_line,
    canonical_json,
    fits_checksum,
    mend_last_line,
    parsed_json,
    remove_partials,
    write_error,
)
from kvopt.storage.keyed_rows import are_damaged, key_of_rows, stored_rows
from kvopt.storage.locks import LockHeld, acquire_lock
from kvopt.version import VERSION

FORMAT_VERSION = 1
MANIFEST_LOCK = ".manifest.lock"
WORKERS = ".workers"
"""Holds a lock for each piece of work that a worker process is at."""


@dataclass
class RunDirectory:
    """One run's folder. Use it inside ``with run.locked():``."""

    path: Path
    manifest: RunManifest = field(default_factory=RunManifest)
    say: Callable[[str], None] = field(default=lambda line: None)
    """Gets a line for what is put aside or taken up again."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where the base is, whose memory the ledger says."""
    less_memory: Callable[[str], str] = field(default=lambda stage: "")
    """What a stage needs less memory with, for the line that says that there was not enough."""
    stages_worked: int = field(default=0, init=False)
    """Stages that this process did itself, rather than find them done."""
    is_shared: bool = field(default=False, init=False)
    """Whether other processes of the same command write here, too."""

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder, clear what a killed process left half-written, and keep other kvopt processes out. Raises
        InputError.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._check_ours()
            lock = acquire_lock(self / ".lock", wait=False)
        except LockHeld:
            raise InputError(
                "another kvopt is working in this run directory",
                where=str(self.path),
                fix="wait for it, or choose another --out",
            ) from None
        except OSError as error:
            raise write_error(error, self.path) from None
        with lock:
            self._check_workers()
            remove_partials(self.path)
            mend_last_line(self / "ledger.jsonl")
            self.read_manifest()
            yield

    def _check_workers(self) -> None:
        """Refuse a folder in which a worker of a command that was killed is still at work."""
        for path in (self / WORKERS).glob("*.lock"):
            try:
                with acquire_lock(path, wait=False):
                    path.unlink()
            except LockHeld:
                what = f"a worker of an earlier command is still at work on {path.stem}"
                raise InputError(what, where=str(self.path), fix="wait for it, or end it") from None

    def workers_left(self) -> None:
        """After workers were at work: take over what they wrote into the manifest, and remove their locks."""
        self.read_manifest()
        self._check_workers()
        shutil.rmtree(self / WORKERS, ignore_errors=True)
        (self / MANIFEST_LOCK).unlink(missing_ok=True)

    @contextlib.contextmanager
    def joined(self, work: str) -> Iterator[None]:
        """Do a piece of ``work`` in a folder that another process of the same command has locked; who comes second
        with the same work waits until it is done. Manifest and ledger are written by one process at a time.
        """
        (self / WORKERS).mkdir(exist_ok=True)
        with acquire_lock(self / WORKERS / f"{work}.lock"):
            self.is_shared = True
            self.read_manifest()
            yield

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Nobody else writes manifest or ledger inside."""
        if not self.is_shared:
            yield
            return
        with acquire_lock(self / MANIFEST_LOCK):
            self.read_manifest()
            yield

    def _check_ours(self) -> None:
        """Refuse a folder with other things in it, because a run removes contexts and partial files."""
        if any(self.path.iterdir()) and not any((self / name).exists() for name in (".lock", "manifest.json")):
            raise InputError(
                "contains other files and is not a run directory",
                where=str(self.path),
                fix="choose an empty --out folder",
            )

    def read_manifest(self) -> None:
        """Take over what the folder's manifest says. Raises InputError for a damaged one."""
        path = self / "manifest.json"
        if not path.is_file():
            return
        try:
            manifest = parsed_json(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise _damaged(path, str(error)) from None
        if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
            raise InputError(
                "was not written by this version of kvopt", where=str(path), fix="choose another --out folder"
            )
        try:
            self.manifest = RunManifest.model_validate(unchecked(manifest))
        except ValidationError as error:
            raise _damaged(path, ": ".join(first_fault(error))) from None
        if not fits_checksum(manifest):
            raise _damaged(path, CHANGED.removeprefix("is damaged: "))

    def describe(self, manifest: RunManifest) -> None:
        """Record what the run stands on: hashes, seed and device as given, and the versions; the stages stay."""
        libraries = ("torch", "transformers", "peft", "tokenizers", "safetensors")
        manifest.format_version = FORMAT_VERSION
        manifest.kvopt_version = VERSION
        manifest.versions = {"python": platform.python_version(), **{name: version(name) for name in libraries}}
        manifest.stages = self.manifest.stages
        self.manifest = manifest
        self.write_manifest()

    def write_manifest(self) -> None:
        write_document(self / "manifest.json", self.manifest)

    @cached_property
    def kept(self) -> Kept:
        """What is put aside."""
        return Kept(self.path, self.say)

    def begin(self, stage: str, key: str, *artefacts: str, remade: Sequence[str] = ()) -> None:
        """Before a stage works: artefacts of another key are put aside, so nothing of another job is taken up, and
        those of this key come back.

        Args:
            remade: files and folders that are deleted instead: one pass over the rows makes them again, and several of
                them would fill the disk.
        """
        with self._undisturbed():
            stages = self.manifest.stages
            if stages.get(stage) != key:
                self.kept.put_aside(stage, stages.get(stage), artefacts, unless=key)
                for name in remade:
                    target = self / name
                    if target.is_dir():
                        shutil.rmtree(target)
                    else:
                        target.unlink(missing_ok=True)
                self._write_stages(stages | {stage: key})
            self.kept.take_up(stage, key)

    def set_aside(self, stage: str, *artefacts: str) -> None:
        """Put aside what a config does not name."""
        self.kept.put_aside(stage, self.manifest.stages.get(stage), artefacts, why=UNNAMED)
        self.forget(stage)

    def forget(self, stage: str) -> None:
        """Take a stage out of the manifest."""
        stages = self.manifest.stages
        if stage in stages:
            self._write_stages({name: key for name, key in stages.items() if name != stage})

    def _write_stages(self, stages: dict[str, str]) -> None:
        self.manifest.stages = dict(sorted(stages.items()))
        self.write_manifest()

    def rows(self, path: Path, key: str, count: int) -> list[dict[str, Any]] | None:
        """As :func:`kvopt.storage.keyed_rows.stored_rows`; rows of another key are put aside, those of this one come
        back.
        """
        rows = stored_rows(path, key, count)
        if rows is None:
            if are_damaged(path):
                self.say(f"warning: {path}: is damaged; it is made again")
            name = path.relative_to(self.path).as_posix()
            self.kept.exchange(name, key, key_of_rows(path) or key, [name])  # what has no key is damaged
            rows = stored_rows(path, key, count)
        return rows

    @contextlib.contextmanager
    def ledger(self, stage: str) -> Iterator[LedgerEntry]:
        """Time a stage; the block may set counts (tokens_in, tokens_out, model_calls, …) of the entry, which is written
        at its end, unless the block finds that there was nothing to do and calls ``entry.leave_out()``.
        """
        entry = LedgerEntry(stage=stage, outcome="interrupted", seconds=0.0)
        start = time.perf_counter()
        try:
            yield entry
            entry.outcome = "done"
        except Exception as error:
            entry.outcome = "failed"
            if is_out_of_memory(error):
                raise out_of_memory(stage, self.device, self.less_memory(stage)) from error
            raise
        finally:
            entry.seconds = round(time.perf_counter() - start, 3)
            entry.peak_memory_bytes, entry.peak_memory_of = peak(self.device), what_is_counted(self.device)
            if not entry.is_left_out:
                self.stages_worked += 1
                # a full disk must not hide what else went wrong, nor stop a run
                with self._undisturbed(), contextlib.suppress(KvoptError):
                    append_line(self / "ledger.jsonl", canonical_json(entry.to_json()))


@dataclass(frozen=True)
class Workspace:
    """What every stage is given beside its inputs: a locked run directory and the progress to report to."""

    directory: RunDirectory
    progress: Progress

    @property
    def say(self) -> Callable[[str], None]:
        """Gets a line for each stage."""
        return self.progress.say


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"is damaged: {what}", where=str(path), fix="delete it; what depends on it is computed again")
