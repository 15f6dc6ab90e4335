"""Locks between processes, on every system that kvopt runs on.

The operating system holds a lock for the process, so it is released however the process ends, SIGKILL included. Where
a file system lacks the system call (ENOSYS, as Lustre mounted without flock), filelock writes the holder's host and
process id into the file instead, and takes the lock over once that process is gone.
"""

from __future__ import annotations

import errno
import os
from contextlib import AbstractContextManager
from pathlib import Path

from filelock import FileLock, Timeout

from kvopt.errors import InputError

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


class LockHeld(Exception):
    """Another process holds the lock."""


def acquire_lock(path: Path, *, wait: bool = True) -> AbstractContextManager[object]:
    """Take the lock file ``path`` now, and return a context that releases it at its end.

    The folder of ``path`` must exist; the file is created where it is missing, and stays after the release.

    Args:
        path: the lock file.
        wait: whether to wait while the lock is held.

    Raises:
        LockHeld: another process, or this one, holds the lock and ``wait`` is off.
        InputError: the file system refuses to lock files.
        OSError: the file cannot be created or opened.
    """
    # Off Windows the file stays anyway, and the option would switch off the substitute for a missing system call.
    lock = FileLock(path, thread_local=False, preserve_lock_file=os.name == "nt")
    try:
        return lock.acquire(blocking=wait)
    except Timeout:
        raise LockHeld(str(path)) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        what = f"this file system cannot lock files: {error.strerror}"
        raise InputError(what, where=str(path), fix="choose a folder on another file system") from error
