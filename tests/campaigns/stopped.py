"""Commands of kvopt that run in a forked child and are stopped at a chosen point: before a call on a file, in the
middle of a write, or at a moment; or whose disk is full there.

The child has everything imported and has computed nothing, so a command starts at once. Nothing in kvopt is changed. An
audit hook counts the calls that change files. In the middle of a write, the operating system stops the process: a limit
on the size of files (RLIMIT_FSIZE) lets the first bytes through; the signal for the rest kills the process, or, with
Python's own handling, is the error of a disk that is full.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CHANGING = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "open", "shutil.rmtree")
LONGEST = 120.0
"""Seconds after which a command counts as hanging."""
PARTIAL = re.compile(r"\.partial|\.writing$")


@dataclass(frozen=True)
class Stop:
    """Where a command is stopped.

    Attributes:
        how: before a call on a file; inside the writes that follow it; after some seconds; with the disk full there; or
            not at all, but a folder vanishes there.
        at: the number of the call, from 1.
        bytes: of inside and full: how much longer the files that it writes may get.
        seconds: of after.
        folder: of vanish.
    """

    how: Literal["before", "inside", "after", "full", "vanish"]
    at: int = 0
    bytes: int = 0
    seconds: float = 0.0
    folder: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """How a command ended: ``code`` is its exit code, or minus the signal; ``calls`` are those on files in its folder,
    up to its end; ``said`` is what it printed.
    """

    code: int
    calls: list[str]
    said: str

    @property
    def killed(self) -> bool:
        return self.code in (-signal.SIGKILL, -signal.SIGXFSZ)


def run(arguments: list[str], folder: Path, stop: Stop | None = None, *, ordinary: bool = False) -> Outcome:
    """One command of kvopt in ``folder``, to its end or to where it is stopped; ``ordinary``: root may do no more than
    what the modes of files allow.
    """
    calls, said = os.pipe(), os.pipe()  # no files: the limit on the size of files must not stop what is said
    child = os.fork()
    if child == 0:
        _in_child(arguments, folder, stop, calls[1], said[1], ordinary)
    os.close(calls[1])
    os.close(said[1])
    with ThreadPoolExecutor(2) as readers:
        texts = [readers.submit(_read, pipe[0]) for pipe in (calls, said)]
        begin = time.monotonic()
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            passed = time.monotonic() - begin
            if passed > LONGEST or (stop and stop.how == "after" and passed > stop.seconds):
                os.kill(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
                break
            time.sleep(0.002)
        seen, words = (text.result() for text in texts)
    if time.monotonic() - begin > LONGEST:
        raise SystemExit(f"kvopt {' '.join(arguments)} hangs: {words[-500:]}")
    return Outcome(os.waitstatus_to_exitcode(status), seen.splitlines(), words)


def _read(descriptor: int) -> str:
    with os.fdopen(descriptor, errors="replace") as pipe:
        return pipe.read()


def _in_child(arguments: list[str], folder: Path, stop: Stop | None, report: int, said: int, ordinary: bool) -> None:
    code = 3
    try:
        if ordinary:
            _give_up_capabilities()
        os.chdir(folder)
        for stream in (1, 2):
            os.dup2(said, stream)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if stop and stop.how == "inside":
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        sys.addaudithook(_hook(str(folder), report, stop))
        sys.argv = ["kvopt", *arguments]
        from kvopt.cli import main

        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 4
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _give_up_capabilities() -> None:
    """Let modes of files bind root, too (capset, Linux)."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")


def _hook(folder: str, report: int, stop: Stop | None) -> Callable[[str, tuple[object, ...]], None]:
    count, vanishing = 0, False

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count, vanishing
        if event not in CHANGING or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        path = os.path.abspath(os.fsdecode(arguments[0]))
        if not path.startswith(folder):
            return
        if event == "open" and not int(str(arguments[2] or 0)) & (os.O_WRONLY | os.O_RDWR):
            return
        if vanishing:
            return
        count += 1
        os.write(report, f"{event} {path.removeprefix(folder)}\n".encode())
        if stop is None or stop.how == "after" or count != stop.at:
            return
        if stop.how == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        if stop.how == "vanish":
            assert stop.folder is not None
            vanishing = True
            shutil.rmtree(stop.folder, ignore_errors=True)
            vanishing = False
            return
        there = os.path.getsize(path) if os.path.isfile(path) else 0
        resource.setrlimit(resource.RLIMIT_FSIZE, (there + stop.bytes, resource.RLIM_INFINITY))

    return hook


def partials(folder: Path) -> list[str]:
    """Files and folders that are not whole."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if PARTIAL.search(path.name))
