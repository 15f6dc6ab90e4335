"""The run directory: manifest, ledger, lock, and the rule that a stage whose inputs did not change is not run again.

Everything in it but ``ledger.jsonl`` and ``report.*`` (which hold times) is a function of the inputs, so an interrupted
run that is continued ends in the same bytes as one that was not.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from pydantic import ValidationError

from kvopt.console.progress import Progress
from kvopt.documents.ledger import LedgerEntry
from kvopt.documents.manifest import RunManifest
from kvopt.documents.validated import first_fault
from kvopt.errors import InputError
from kvopt.kernels.memory import peak_resident
from kvopt.storage.files import canonical_json, remove_partials, write_error, write_json
from kvopt.storage.locks import LockHeld, acquire_lock
from kvopt.version import VERSION

FORMAT_VERSION = 1


@dataclass
class RunDirectory:
    """One run's folder. Use it inside ``with run.locked():``."""

    path: Path
    manifest: RunManifest = field(default_factory=RunManifest)
    stages_worked: int = field(default=0, init=False)
    """Stages that this process did itself, rather than find them done."""

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
            remove_partials(self.path)
            self._mend_ledger()
            self._read_manifest()
            yield

    def _check_ours(self) -> None:
        """Refuse a folder with other things in it, because a run removes contexts and partial files."""
        if any(self.path.iterdir()) and not any((self / name).exists() for name in (".lock", "manifest.json")):
            raise InputError(
                "contains other files and is not a run directory",
                where=str(self.path),
                fix="choose an empty --out folder",
            )

    def _mend_ledger(self) -> None:
        """Cut off the last line of the ledger where a kill left half of it."""
        path = self / "ledger.jsonl"
        if path.is_file() and (data := path.read_bytes()) and not data.endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)

    def _read_manifest(self) -> None:
        path = self / "manifest.json"
        if not path.is_file():
            return
        try:
            manifest = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise _damaged(path, str(error)) from None
        if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
            raise InputError(
                "was not written by this version of kvopt", where=str(path), fix="choose another --out folder"
            )
        try:
            self.manifest = RunManifest.model_validate(manifest)
        except ValidationError as error:
            raise _damaged(path, ": ".join(first_fault(error))) from None

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
        write_json(self / "manifest.json", self.manifest.to_json())

    def begin(self, stage: str, key: str, *artefacts: str) -> None:
        """Before a stage works: when its key changed, its old artefacts go, so nothing of another job is taken up."""
        stages = self.manifest.stages
        if stages.get(stage) != key:
            for name in artefacts:
                target = self / name
                if target.is_dir():
                    shutil.rmtree(target)
                else:
                    target.unlink(missing_ok=True)
            self.manifest.stages = stages | {stage: key}
            self.write_manifest()

    def keep_stages(self, names: set[str]) -> None:
        """Forget stages that the config no longer has."""
        stages = self.manifest.stages
        self.manifest.stages = {name: stages[name] for name in sorted(stages) if name in names}
        self.write_manifest()

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
        except Exception:
            entry.outcome = "failed"
            raise
        finally:
            entry.seconds = round(time.perf_counter() - start, 3)
            entry.peak_memory_bytes = peak_resident()
            if not entry.is_left_out:
                self.stages_worked += 1
                self._append_to_ledger((canonical_json(entry.to_json()) + "\n").encode("utf-8"))

    def _append_to_ledger(self, line: bytes) -> None:
        """Add a whole line or nothing; a full disk must not hide what else went wrong, nor stop a run that goes on."""
        with contextlib.suppress(OSError), (self / "ledger.jsonl").open("ab", buffering=0) as file:
            start = file.seek(0, os.SEEK_END)
            try:
                if file.write(line) != len(line):
                    file.truncate(start)
                os.fsync(file.fileno())
            except OSError:
                file.truncate(start)


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
