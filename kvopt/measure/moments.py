"""Moments of the reference, kept beside its hidden states: ``reference.storage: moments``.

A training step then takes two head products instead of three, both in float32; making the moments takes two more, once
for each gold token (``kernels/README.md`` says where that pays). Scores and held-out KL still come from the hidden
states, which stay stored. Only training rows have moments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from kvopt.errors import InputError
from kvopt.kernels import Head, Moments, moments_of
from kvopt.measure.reference import Reference
from kvopt.storage.files import key_of
from kvopt.storage.tensors import read_tensors, stored_key, write_tensors

MOMENTS_VERSION = 1
"""Raise it when the same inputs give other moments."""
ROWS_PER_FILE = 64


class StoredMoments:
    """Moments of some examples of a reference; ``of`` gives those of a batch.

    Files hold fixed runs of examples, each computed at once, so that an interrupted build ends in the same bytes.
    """

    def __init__(self, reference: Reference, example_ids: Sequence[str]) -> None:
        self.reference = reference
        self.key = key_of(MOMENTS_VERSION, [reference.key, "moments", list(example_ids), ROWS_PER_FILE])
        self._ids = list(example_ids)
        self._places = {example_id: place for place, example_id in enumerate(self._ids)}
        self._files: dict[int, list[Moments]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process reads the files itself."""
        return _opened_here, (self.key, self.reference, self._ids)

    def build(
        self,
        head: Head,
        progress: Callable[[int], None] | None = None,
        stored: Callable[[int], None] | None = None,
    ) -> int:
        """Computes the files that are missing, and returns how many; files of an earlier, longer build go. ``progress``
        is called with the number of rows finished, ``stored`` with that of rows that were there already.

        Raises InputError for a head whose logits have no moments.
        """
        check_head(head)
        computed, groups = 0, self._groups()
        drop_moments(self.reference.folder, len(groups))
        for number, ids in enumerate(groups):
            path = self._path(number)
            there = stored_key(path) == self.key
            if not there:
                computed += 1
                moments = moments_of(self.reference.hidden(ids).to(head.weight.device), head)
                tensors = {"mean_weight": moments.mean_weight, "mean_bias": moments.mean_bias}
                write_tensors(path, {**tensors, "entropy": moments.entropy}, self.key)
            if report := stored if there else progress:
                report(len(ids))
        return computed

    def of(self, example_ids: Sequence[str], device: torch.device | str) -> Moments:
        """Moments of the gold tokens of these examples, one after the other."""
        per_example = [self._one(self._places[i]) for i in example_ids]
        return Moments(
            torch.cat([moments.mean_weight for moments in per_example]).to(device),
            torch.cat([moments.mean_bias for moments in per_example]).to(device),
            torch.cat([moments.entropy for moments in per_example]).to(device),
        )

    def _groups(self) -> list[list[str]]:
        return [self._ids[start : start + ROWS_PER_FILE] for start in range(0, len(self._ids), ROWS_PER_FILE)]

    def _path(self, number: int) -> Path:
        return self.reference.folder / f"moments-{number:05d}.safetensors"

    def _one(self, place: int) -> Moments:
        number, inside = divmod(place, ROWS_PER_FILE)
        if number not in self._files:
            if stored_key(self._path(number)) != self.key:
                raise InputError(
                    "the stored moments are missing, damaged or another's",
                    where=str(self._path(number)),
                    fix="kvopt run makes them again",
                )
            moments = Moments(**read_tensors(self._path(number)))
            ends = torch.tensor([0, *self.reference.counts(self._groups()[number])]).cumsum(0).tolist()
            self._files[number] = [moments[start:end] for start, end in pairwise(ends)]
        return self._files[number][inside]


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
