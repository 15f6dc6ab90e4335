"""Moments of the reference, kept beside its hidden states: ``reference.storage: moments``.

A training step then takes two head products instead of three, both in float32; making the moments takes two more, once
for each gold token (``kernels/README.md`` says where that pays). Scores and held-out KL still come from the hidden
states, which stay stored. Only training rows have moments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from kvopt.errors import InputError
from kvopt.kernels import Head, Moments, moments_of
from kvopt.measure.reference import Reference, cut_by_tokens
from kvopt.storage.files import key_of
from kvopt.storage.tensors import check_tensors, stored_key, write_tensors

MOMENTS_VERSION = 1
"""Raise it when the same inputs give other moments."""
ROWS_PER_FILE = 64
TOKENS_PER_FILE = 32768
"""Gold tokens of a file, at most, unless one row has more: at a hidden size of 8,192 they take 1 GiB."""


class StoredMoments:
    """Moments of some examples of a reference; ``of`` gives those of a batch.

    Files hold fixed runs of examples, each computed at once, so that an interrupted build ends in the same bytes.
    """

    def __init__(self, reference: Reference, example_ids: Sequence[str]) -> None:
        self.reference = reference
        self._groups = cut_by_tokens(
            list(zip(example_ids, reference.counts(example_ids), strict=True)), ROWS_PER_FILE, TOKENS_PER_FILE
        )
        plain = all(len(group) == ROWS_PER_FILE for group in self._groups[:-1])
        limits = [ROWS_PER_FILE] if plain else [ROWS_PER_FILE, TOKENS_PER_FILE]
        self.key = key_of(MOMENTS_VERSION, [reference.key, "moments", list(example_ids), *limits])
        self._places: dict[str, tuple[int, int, int]] = {}
        for number, group in enumerate(self._groups):
            ends = [0, *accumulate(count for _, count in group)]
            for (example_id, _), (start, end) in zip(group, pairwise(ends), strict=True):
                self._places[example_id] = number, start, end
        self._files: dict[int, Any] = {}
        self._head: Head | None = None
        self._say: Callable[[str], None] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process reads the files itself."""
        return _opened_here, (self.key, self.reference, list(self._places))

    def build(
        self,
        head: Head,
        progress: Callable[[int], None] | None = None,
        stored: Callable[[int], None] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> int:
        """Computes the files that are missing, and returns how many; files of an earlier, longer build go. ``progress``
        is called with the number of rows finished, ``stored`` with that of rows that were there already, and ``say``
        with a line for a file that is found damaged when it is read, and made again.

        Raises InputError for a head whose logits have no moments.
        """
        check_head(head)
        self._head, self._say = head, say
        computed = 0
        drop_moments(self.reference.folder, len(self._groups))
        for number, ids in enumerate(self._ids_of(number) for number in range(len(self._groups))):
            there = stored_key(self._path(number)) == self.key
            if not there:
                computed += 1
                self._make(number, head)
            if report := stored if there else progress:
                report(len(ids))
        return computed

    def of(self, example_ids: Sequence[str], device: torch.device | str) -> Moments:
        """Moments of the gold tokens of these examples, one after the other, read from their files through a memory
        map: nothing is kept.
        """
        per_example = [self._one(*self._places[i]) for i in example_ids]
        return Moments(
            torch.cat([moments.mean_weight for moments in per_example]).to(device),
            torch.cat([moments.mean_bias for moments in per_example]).to(device),
            torch.cat([moments.entropy for moments in per_example]).to(device),
        )

    def _ids_of(self, number: int) -> list[str]:
        return [example_id for example_id, _ in self._groups[number]]

    def _make(self, number: int, head: Head) -> None:
        self._files.pop(number, None)
        moments = moments_of(self.reference.hidden(self._ids_of(number)).to(head.weight.device), head)
        tensors = {"mean_weight": moments.mean_weight, "mean_bias": moments.mean_bias, "entropy": moments.entropy}
        write_tensors(self._path(number), tensors, self.key)

    def _path(self, number: int) -> Path:
        return self.reference.folder / f"moments-{number:05d}.safetensors"

    def _one(self, number: int, start: int, end: int) -> Moments:
        if number not in self._files:
            if stored_key(self._path(number)) != self.key:
                raise InputError(
                    "the stored moments are missing, damaged or another's",
                    where=str(self._path(number)),
                    fix="kvopt run makes them again",
                )
            self._check(number)
            self._files[number] = safe_open(str(self._path(number)), framework="pt").__enter__()
        file = self._files[number]
        return Moments(**{name: file.get_slice(name)[start:end] for name in ("mean_weight", "mean_bias", "entropy")})

    def _check(self, number: int) -> None:
        """Reads a file once; a damaged one is made again where the head is known."""
        try:
            check_tensors(self._path(number))
        except InputError as damage:
            if self._head is None:
                raise
            if self._say:
                self._say(f"warning: {damage.where}: {damage.what}; it is made again")
            self._make(number, self._head)


_opened: dict[Path, StoredMoments] = {}
"""What this process opened for another one."""


def _opened_here(key: str, reference: Reference, example_ids: list[str]) -> StoredMoments:
    known = _opened.get(reference.folder)
    if known is None or known.key != key:
        _opened[reference.folder] = known = StoredMoments(reference, example_ids)
    return known


def check_head(head: Head) -> None:
    """Raises InputError where logits are no linear function of the hidden states."""
    if head.softcap is not None:
        raise InputError(
            "the base caps its logits (softcap), which moments cannot represent",
            where="reference.storage: moments",
            fix="use storage: hidden",
        )


def drop_moments(folder: Path, kept: int = 0) -> None:
    """Removes moments from a reference's folder, those of an earlier config, but for the first ``kept`` files."""
    for path in sorted(folder.glob("moments-*.safetensors"))[kept:]:
        path.unlink()
