"""A lock file keeps other processes out, is free again however its holder ends, and works on any file system."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvopt.errors import InputError, KvoptError
from kvopt.run.directory import RunDirectory
from kvopt.storage.locks import LockHeld, acquire_lock

ROOT = Path(__file__).parents[1]
HOLDER = """
import sys, time
from pathlib import Path
from kvopt.storage.locks import acquire_lock
with acquire_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def holder(path, before=""):
    """Another process that holds the lock until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", before + HOLDER, str(path)], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout.readline() == b"held\n"
    return process


def refuse(number):
    def flock(descriptor, operation):
        raise OSError(number, os.strerror(number))

    return flock


def test_a_lock_is_refused_at_once_while_another_process_holds_it_and_free_after_sigkill(tmp_path):
    path = tmp_path / ".lock"
    process = holder(path)
    try:
        with pytest.raises(LockHeld):
            acquire_lock(path, wait=False)
    finally:
        process.kill()
        process.wait()
    with acquire_lock(path, wait=False):
        pass
    assert path.is_file()


def test_a_run_directory_is_locked_against_itself_and_free_after_an_error(tmp_path):
    def second():
        with RunDirectory(tmp_path / "run").locked():
            pass

    def first():
        with RunDirectory(tmp_path / "run").locked():
            second()

    with pytest.raises(InputError, match=r"run: another kvopt is working in this run directory \(wait for it"):
        first()
    second()


def test_the_lock_of_an_older_version_is_respected_and_its_file_used_again(tmp_path):
    path = tmp_path / ".lock"
    with path.open("a") as older:
        fcntl.flock(older, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(LockHeld):
            acquire_lock(path, wait=False)
    inode = path.stat().st_ino
    with acquire_lock(path, wait=False), path.open("a") as older, pytest.raises(BlockingIOError):
        fcntl.flock(older, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert path.stat().st_ino == inode


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_without_the_system_call_the_file_names_its_holder_and_a_killed_holder_is_replaced(tmp_path, monkeypatch):
    path = tmp_path / ".lock"
    missing = "import errno, fcntl\ndef flock(*_):\n    raise OSError(errno.ENOSYS, 'missing')\nfcntl.flock = flock\n"
    process = holder(path, missing)
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOSYS))
    try:
        with pytest.raises(LockHeld):
            acquire_lock(path, wait=False)
    finally:
        process.kill()
        process.wait()
    with acquire_lock(path, wait=False), pytest.raises(LockHeld):
        acquire_lock(path, wait=False)


def test_a_file_system_that_refuses_locks_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
    with pytest.raises(InputError, match=r"\.lock: this file system cannot lock files: No locks available \(choose"):
        RunDirectory(tmp_path / "run").locked().__enter__()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_takes_no_lock_file_is_one_line(tmp_path, monkeypatch, number):
    opened = os.open

    def closed(path, *args, **kwargs):
        if str(path).endswith(".lock"):
            raise OSError(number, os.strerror(number), path)
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", closed)
    with pytest.raises(KvoptError, match="the disk is full" if number == errno.ENOSPC else "no permission to write"):
        RunDirectory(tmp_path / "run").locked().__enter__()
