"""A mutation as it is recorded, and the journal that survives being killed."""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvopt.errors import InputError
from kvopt.storage.files import parsed_json, write_bytes, write_error
from kvopt.task.template import Message, Template


@dataclass(frozen=True)
class Mutation:
    """One attempt of the search.

    Attributes:
        id: 12 hex digits of the template's hash; of the attempt's when there is no template.
        name: ``m001``, … for accepted ones, else None.
        attempt: its number, from 0.
        template: the candidate; None when none was made.
        operators: what was applied to the parent, in order.
        lineage: ids of the accepted mutations that it comes from, oldest first; empty for children of the original.
        family: the family that the attempt began with.
        seed: of the attempt.
        accepted: whether it may be used.
        reason: why not, a stable name (:mod:`kvopt.mutate.validity`).
        detail: more about the reason, or about how a paraphrase was made.
        search: hash of what the search depends on (template, operators, seed, …).
        check: what a judge said of its meaning, ``{"same", "reason"}``; None where none was asked.
    """

    id: str
    name: str | None
    attempt: int
    template: Template | None
    operators: tuple[str, ...]
    lineage: tuple[str, ...]
    family: str
    seed: int
    accepted: bool
    reason: str | None = None
    detail: str | None = None
    search: str = ""
    check: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "name": self.name,
            "attempt": self.attempt,
            "accepted": self.accepted,
            "reason": self.reason,
            "detail": self.detail,
            "family": self.family,
            "operators": list(self.operators),
            "lineage": list(self.lineage),
            "seed": self.seed,
            "template": self.template.to_json() if self.template else None,
            "search": self.search,
        } | ({"check": self.check} if self.check is not None else {})

    @classmethod
    def from_json(cls, record: Mapping[str, Any], *, where: str = "mutation") -> Mutation:
        """The mutation of :meth:`to_json`. Raises InputError for anything else, as a text that its id is not of."""
        try:
            template = _template(record["template"]) if record["template"] else None
            if template is not None and record["id"] != template.sha256[:12]:
                raise InputError("its text is not the one that its id is of", where=where)
            if record["accepted"] and (template is None or not isinstance(record["name"], str)):
                raise InputError("is accepted without a name or a text", where=where)
            return cls(
                id=record["id"],
                name=record["name"],
                attempt=record["attempt"],
                template=template,
                operators=tuple(record["operators"]),
                lineage=tuple(record["lineage"]),
                family=record["family"],
                seed=record["seed"],
                accepted=record["accepted"],
                reason=record["reason"],
                detail=record["detail"],
                search=record["search"],
                check=record.get("check"),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"not a mutation: {error!r}", where=where) from None


def _template(record: Mapping[str, Any]) -> Template:
    """A recorded candidate, whatever is wrong with it: a rejected one may have lost its slots."""
    if "text" in record:
        return Template(text=record["text"])
    return Template(messages=tuple(Message(m["role"], m["content"]) for m in record["messages"]))


def _line(mutation: Mutation) -> bytes:
    return (json.dumps(mutation.to_json(), ensure_ascii=False) + "\n").encode("utf-8")


def counts_by_reason(mutations: Sequence[Mutation]) -> dict[str, int]:
    """How many were accepted, then how many were rejected for each reason, most frequent first."""
    rejected = Counter(m.reason or "unknown" for m in mutations if not m.accepted)
    return {
        "accepted": sum(m.accepted for m in mutations),
        **dict(sorted(rejected.items(), key=lambda c: (-c[1], c[0]))),
    }


def read_mutations(path: Path) -> list[Mutation]:
    """Every mutation of a journal; a torn last line is left out. Raises InputError for other damage."""
    return _parse(Path(path))[0]


def search_of(path: Path) -> str | None:
    """Which search a journal is of; None for none, or an empty one."""
    attempts = read_mutations(path)
    return attempts[0].search if attempts else None


def _parse(path: Path) -> tuple[list[Mutation], int]:
    """The mutations of a journal and how many bytes of it are good."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    lines = data.split(b"\n")
    mutations, good = [], 0
    for i, line in enumerate(lines[:-1]):
        where = f"{path}:{i + 1}"
        try:
            mutation = Mutation.from_json(parsed_json(line.decode("utf-8")), where=where)
        except (ValueError, InputError):
            if i == len(lines) - 2 and not lines[-1]:
                break
            raise InputError("the line is damaged", where=where, fix="delete the file to start over") from None
        mutations.append(mutation)
        good += len(line) + 1
    return mutations, good


REST = ".{}.rest"
"""Attempts of the same search that are more than is wanted now."""


class Journal:
    """``mutations.jsonl``: one line an attempt, on disk before the next one begins."""

    def __init__(self, path: Path, search: str):
        """Open ``path`` and keep what belongs to ``search`` and is whole; the rest of the file is cut off. Attempts
        that :meth:`keep` left out are there again.
        """
        self.path = Path(path)
        self._rest = self.path.with_name(REST.format(self.path.name))
        attempts, good = _parse(self.path)
        if any(m.search != search or m.attempt != i for i, m in enumerate(attempts)):
            attempts, good = [], 0
        self.attempts = attempts
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("r+b" if self.path.exists() else "w+b", buffering=0)
            self._file.truncate(good)
            self._file.seek(good)
        except OSError as error:
            raise write_error(error, self.path) from None
        if self._rest.is_file():
            self._take_rest(search)

    def _take_rest(self, search: str) -> None:
        for mutation in _parse(self._rest)[0]:
            if mutation.search == search and mutation.attempt == len(self.attempts):
                self.append(mutation)
                self.attempts.append(mutation)
        self._rest.unlink()

    def keep(self, count: int) -> None:
        """Keep only the first ``count`` attempts; the others are put beside, for a search that wants more of them."""
        if count >= len(self.attempts):
            return
        self._file.seek(0)
        lines = self._file.readall().split(b"\n")
        good = sum(len(line) + 1 for line in lines[:count])
        write_bytes(self._rest, b"\n".join(lines[count:]))
        self._file.truncate(good)
        self._file.seek(good)
        self.attempts = self.attempts[:count]

    def leave_out(self, count: int) -> None:
        """Cut off all but the first ``count`` attempts."""
        self._file.seek(0)
        good = sum(len(line) + 1 for line in self._file.readall().split(b"\n")[:-1][:count])
        self._file.truncate(good)
        self._file.seek(good)

    def replace(self, mutation: Mutation) -> None:
        """Put an attempt in the place of the one with its number, and wait until it is on disk."""
        self._file.seek(0)
        lines = self._file.readall().split(b"\n")
        lines[mutation.attempt] = _line(mutation).rstrip(b"\n")
        write_bytes(self.path, b"\n".join(lines))
        self._file.close()
        self._file = self.path.open("r+b", buffering=0)
        self._file.seek(0, os.SEEK_END)

    def append(self, mutation: Mutation) -> None:
        """Write one attempt and wait until it is on disk. On a full disk nothing half-written is left."""
        start = self._file.tell()
        try:
            line = _line(mutation)
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(start)
            raise write_error(error, self.path) from error

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
