"""The exceptions that kvopt raises on purpose, what each means for the exit code, and how messages count things."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class KvoptError(Exception):
    """Something failed that is not the user's input (exit code 1)."""

    exit_code = 1


class InputError(KvoptError):
    """The input is wrong: one line that says where, what, and how to fix it (exit code 2, no traceback).

    Args:
        what: what is wrong, e.g. ``"slot 'text' has no column"``.
        where: file, line, key or name that it was found at, e.g. ``"train.jsonl:12"``.
        fix: what the user can do, e.g. ``"rename the column or add it to data.columns"``.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None):
        self.what, self.where, self.fix = what, where, fix
        line = f"{where}: {what}" if where else what
        super().__init__(f"{line} ({fix})" if fix else line)


def missing_extra(extra: str, what: str, where: str | None = None) -> InputError:
    """The error for something that needs a library of an extra, which is not installed.

    Args:
        extra: its name in pyproject.toml, such as ``"gguf"``.
        what: what needs it, such as ``"reading a .gguf file"``.
        where: the key, option or file that asked for it.
    """
    return InputError(f"{what} needs the extra {extra!r}", where=where, fix=f"pip install 'kvopt[{extra}]'")


@contextmanager
def from_extra(extra: str, what: str, where: str | None = None) -> Iterator[None]:
    """For imports of an extra's libraries: where one of them is absent, :func:`missing_extra` is raised."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "kvopt").partition(".")[0] == "kvopt":
            raise
        raise missing_extra(extra, what, where) from None


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """``1 row``, ``2 rows``: a number with its noun in the form that goes with it."""
    if number == 1:
        return f"1 {noun}"
    if plural is None:
        ends_like_study = noun.endswith("y") and noun[-2:-1] not in "aeiou"
        plural = f"{noun[:-1]}ies" if ends_like_study else f"{noun}s"
    return f"{number} {plural}"
