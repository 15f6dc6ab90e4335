"""Reading documents: a file as the model that it was written from, with one line for what is damaged. What is written
here has a checksum of its entries as the last one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from kvopt.documents.leaderboard_file import LeaderboardDocument
from kvopt.documents.part import DocumentPart
from kvopt.errors import InputError
from kvopt.storage.files import (
    CHANGED,
    CHECKSUM,
    fits_checksum,
    parsed_json,
    read_record_file,
    with_checksum,
    write_json,
)

BY_HAND = "delete its last entry, the checksum, if you changed it yourself"
RUN_AGAIN = "delete it and run kvopt run again"

Document = TypeVar("Document", bound=BaseModel)


def read_document(model: type[Document], path: Path, what: str = f"is damaged; {RUN_AGAIN}") -> Document:
    """A document of a run directory.

    Args:
        what: what the message says of a file that does not fit the model.

    Raises:
        InputError: the file cannot be read, or does not fit; it names the first entry that is wrong.
    """
    value = json_value(path)
    try:
        found = model.model_validate(unchecked(value))
    except ValidationError as error:
        place, message = first_fault(error)
        shown = [part for part in (place, message) if part and (place or error.errors()[0]["type"] == "value_error")]
        reason = f" ({': '.join(shown)})" if shown else ""
        raise InputError(what + reason, where=str(path)) from None
    check_unchanged(value, path, RUN_AGAIN)
    return found


def write_document(path: Path, document: DocumentPart) -> None:
    """Write a document with its checksum, atomically."""
    write_json(path, with_checksum(document.to_json()))


def unchecked(value: Any) -> Any:
    """A document's entries without the checksum."""
    return {name: entry for name, entry in value.items() if name != CHECKSUM} if isinstance(value, dict) else value


def check_unchanged(value: Any, path: Path, fix: str) -> None:
    """Raises InputError for a document whose checksum is not that of its entries; older ones have none."""
    if isinstance(value, dict) and not fits_checksum(value):
        raise InputError(CHANGED, where=str(path), fix=f"{fix}; {BY_HAND}")


def read_record_of(model: type[Document], path: Path, version: int) -> Document | None:
    """What a folder says of itself, None where there is no such file.

    Raises:
        InputError: a damaged file, or one of another ``format_version``.
    """
    value = read_record_file(path, version)
    return None if value is None else validated_record(model, value, path)


def validated_record(model: type[Document], value: dict[str, Any], path: Path) -> Document:
    """The record of a folder. Raises InputError, with the first entry that is not what it must be."""
    try:
        found = model.model_validate(unchecked(value))
    except ValidationError as error:
        place, message = first_fault(error)
        message = "must be a plain file name" if place == "name" else message
        raise InputError(f"is damaged: {place}: {message}", where=str(path), fix="restore or rebuild it") from None
    check_unchanged(value, path, "restore or rebuild it")
    return found


def read_leaderboard(path: Path) -> LeaderboardDocument:
    """A ``leaderboard.json``. Raises InputError for a damaged one."""
    return read_document(LeaderboardDocument, path, "is not a leaderboard")


def json_value(path: Path) -> Any:
    """The JSON of a file in a run directory. Raises InputError."""
    try:
        return parsed_json(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read: {reason_of(error)}", where=str(path), fix=RUN_AGAIN) from None


def first_fault(error: ValidationError) -> tuple[str, str]:
    """Where the first wrong entry stands (dotted; empty: the whole value), and what is wrong with it."""
    first = error.errors(include_url=False)[0]
    return ".".join(str(part) for part in first["loc"]), first["msg"].removeprefix("Value error, ")


def reason_of(error: BaseException) -> str:
    """What an exception says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
