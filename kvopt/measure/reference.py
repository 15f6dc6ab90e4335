"""The reference p(·|V,C): hidden states of the base under the original template at every position that predicts a gold
token.

Kept as safetensors shards of some hundred examples, in the model's dtype, with the key of everything they depend on;
read back row by row through a memory map. Rows are added when something first needs them, in shards of their own; what
is stored never changes: a shard's hash is checked when the first of its rows is read (a byte is hashed for V/2
multiplications of the head, which reads it), and a damaged one is made again. Logits are never stored: the head is
applied when they are needed (``kvopt.kernels``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor

from kvopt.base.launch import split
from kvopt.base.loading import Base
from kvopt.base.prefix import Prefix, batch_states
from kvopt.errors import InputError, KvoptError
from kvopt.kernels import Head, KLOptions, ReferenceFacts, reference_facts
from kvopt.storage.files import CHANGED, fits_checksum, key_of, parsed_json, with_checksum, write_json
from kvopt.storage.tensors import check_tensors, stored_key, write_tensors
from kvopt.task.seam import Encoded, Row, length_buckets

REFERENCE_VERSION = 1
"""Raise it when the same inputs give other hidden states."""
ROWS_PER_SHARD = 256
TOKENS_PER_SHARD = 65536
"""Gold tokens of a shard, at most, unless one row has more: at a hidden size of 8,192 they take 1 GiB in 16 bits, which
is what a build holds in memory.
"""
INDEX = "index.json"
FACTS_ROWS = 32
"""Examples of a shard whose facts are computed together, always the same ones: what was asked for first changes no
bit.
"""
FACTS_TOKENS = 16384
"""Gold tokens of them whose hidden states are on the device at the same time."""

Progress = Callable[[int], None]


def reference_key(base: Base, encoded: Encoded, batch_size: int) -> str:
    """Identity of all that the reference depends on: base, dtype, token stream, batching."""
    limits = [ROWS_PER_SHARD] + ([TOKENS_PER_SHARD] if encoded.gold_tokens > TOKENS_PER_SHARD else [])
    return key_of(
        REFERENCE_VERSION,
        [base.identity, str(base.dtype), str(base.device.type), encoded.sha256(), batch_size, *limits],
    )


def cut_by_tokens(counts: Sequence[tuple[str, int]], rows: int, tokens: int) -> list[list[tuple[str, int]]]:
    """Example ids and their numbers of tokens, in order, cut into runs of at most so many rows and tokens; a row with
    more tokens stands alone.
    """
    runs: list[list[tuple[str, int]]] = []
    total = 0
    for example_id, count in counts:
        if not runs or len(runs[-1]) == rows or total + count > tokens:
            runs.append([])
            total = 0
        runs[-1].append((example_id, count))
        total += count
    return runs


@dataclass
class Reference:
    """Stored hidden states; ``hidden`` gives those of some examples.

    Attributes:
        folder, key: where it is stored, and the identity of all that it depends on.
        index: by example id: its shard, its first token there, and the end of its tokens.
        hidden_size: D.
        make_again: makes a damaged shard again, which the error says is damaged; None: the error is raised.
    """

    folder: Path
    key: str
    index: dict[str, tuple[int, int, int]]
    hidden_size: int
    make_again: Callable[[int, InputError], None] | None = None

    def __post_init__(self) -> None:
        self._files: dict[int, Any] = {}
        self._shards: dict[int, list[str]] = {}
        for example_id, (shard, _, _) in self.index.items():
            self._shards.setdefault(shard, []).append(example_id)
        self._places = {i: (shard, place) for shard, ids in self._shards.items() for place, i in enumerate(ids)}
        self._facts: dict[tuple[int, int, float], list[ReferenceFacts]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the files itself."""
        return _opened_here, (self.folder, self.key, len(self.index))

    def lacks(self, example_ids: Collection[str]) -> bool:
        """Whether one of these examples is not stored."""
        return any(example_id not in self.index for example_id in example_ids)

    def known_from(self, earlier: Reference) -> Self:
        """This reference, with the facts that the same one had computed when it had fewer rows."""
        self._facts = earlier._facts
        return self

    def rows_of(self, shard: int) -> list[str]:
        """The examples of a shard, in order."""
        return self._shards[shard]

    def hidden(self, example_ids: Sequence[str]) -> Tensor:
        """[G, D], the gold tokens of these examples one after the other."""
        return torch.cat([self._slice(*self.index[i]) for i in example_ids])

    def facts(self, example_ids: Sequence[str], head: Head, options: KLOptions | None = None) -> ReferenceFacts:
        """What scores need of the reference alone, for the tokens of ``hidden``; computed once and kept.

        ``head`` is the base's own, always the same for one reference.
        """
        options = options or KLOptions()
        per_example = [self._facts_of(self._places[i], head, options) for i in example_ids]
        return ReferenceFacts(
            torch.cat([facts.log_partition for facts in per_example]),
            torch.cat([facts.entropy for facts in per_example]),
        )

    def _facts_of(self, place: tuple[int, int], head: Head, options: KLOptions) -> ReferenceFacts:
        shard, (block, inside) = place[0], divmod(place[1], FACTS_ROWS)
        key = shard, block, options.temperature
        if key not in self._facts:
            ids = self._shards[shard][block * FACTS_ROWS : (block + 1) * FACTS_ROWS]
            plain = KLOptions(temperature=options.temperature)
            parts = [
                reference_facts(part.to(head.weight.device), head, plain)
                for part in self.hidden(ids).split(FACTS_TOKENS)
            ]
            facts = ReferenceFacts(
                torch.cat([part.log_partition for part in parts]), torch.cat([part.entropy for part in parts])
            )
            ends = torch.tensor([0, *self.counts(ids)]).cumsum(0).tolist()
            self._facts[key] = [facts[start:end] for start, end in pairwise(ends)]
        return self._facts[key][inside]

    def counts(self, example_ids: Sequence[str]) -> list[int]:
        """Gold tokens of each example."""
        return [self.index[i][2] - self.index[i][1] for i in example_ids]

    def _slice(self, shard: int, first: int, end: int) -> Tensor:
        if shard not in self._files:
            path = self.folder / shard_name(shard)
            try:
                check_tensors(path)
            except InputError as damage:
                if self.make_again is None:
                    raise
                self.make_again(shard, damage)
            self._files[shard] = safe_open(str(path), framework="pt").__enter__()
        return self._files[shard].get_slice("hidden")[first:end]


@dataclass
class HeldReference(Reference):
    """A reference in memory, for work that has no run directory.

    Attributes:
        held: hidden states by shard, [G, D] each, in the base's dtype, on the CPU.
    """

    held: list[Tensor] = field(default_factory=list)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process gets the states themselves."""
        return HeldReference, (self.folder, self.key, self.index, self.hidden_size, None, self.held)

    def _slice(self, shard: int, first: int, end: int) -> Tensor:
        return self.held[shard][first:end]


_opened: dict[Path, Reference] = {}
"""What this process opened for another one."""


def _opened_here(folder: Path, key: str, rows: int) -> Reference:
    """The reference of another process, with what this one has computed of it so far."""
    known = _opened.get(folder)
    if known is None or known.key != key:
        _opened[folder] = open_reference(folder, key)
    elif len(known.index) != rows:
        _opened[folder] = open_reference(folder, key).known_from(known)
    return _opened[folder]


def shard_name(shard: int) -> str:
    return f"hidden-{shard:05d}.safetensors"


def build_reference(
    base: Base,
    prefix: Prefix,
    encoded: Encoded,
    folder: Path,
    *,
    batch_size: int = 16,
    wanted: Collection[str] | None = None,
    progress: Progress | None = None,
    stored: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Reference:
    """Compute what is missing of the reference in ``folder`` and open it.

    Shards with the right key are kept, so an interrupted build goes on where it stopped and ends in the same bytes; one
    that is missing, truncated or another's is made again of its own rows.

    Args:
        base, prefix, encoded: the base, the original template's prefix, and all rows under it.
        folder: where the shards are.
        batch_size: rows a batch.
        wanted: ids of the examples that are needed now; default: all.
        progress: called with the number of rows finished.
        stored: called with the number of wanted rows that were there already.
        say: gets a line for what is damaged.
    """
    key = reference_key(base, encoded, batch_size)
    by_id = {row.example_id: row for row in encoded.rows}
    shards = _stored_shards(folder, key, {i: len(row.gold) for i, row in by_id.items()}, say)
    for number, shard in enumerate(shards):
        if stored_key(path := folder / shard_name(number)) != key:
            if say and path.is_file():
                say(f"warning: {path}: is damaged; it is made again")
            hidden = _hidden_of(base, prefix, [by_id[i] for i, _ in shard], batch_size, None)
            write_tensors(path, {"hidden": hidden}, key)
    kept = {example_id for shard in shards for example_id, _ in shard}
    rows = [row for row in encoded.rows if wanted is None or row.example_id in wanted]
    missing = [row for row in rows if row.example_id not in kept]
    if stored and len(missing) < len(rows):
        stored(len(rows) - len(missing))
    rest = iter(missing)
    for counts in cut_by_tokens([(row.example_id, len(row.gold)) for row in missing], ROWS_PER_SHARD, TOKENS_PER_SHARD):
        part = list(islice(rest, len(counts)))
        hidden = _hidden_of(base, prefix, part, batch_size, progress)
        write_tensors(folder / shard_name(len(shards)), {"hidden": hidden}, key)
        shards.append(counts)
        index = {
            "key": key,
            "dtype": str(base.dtype).removeprefix("torch."),
            "hidden_size": base.geometry.hidden_size,
            "shards": [len(shard) for shard in shards],
            "rows": [list(row) for shard in shards for row in shard],
        }
        write_json(folder / INDEX, with_checksum(index))
    return open_reference(folder, key)


def hold_reference(
    base: Base,
    prefix: Prefix,
    encoded: Encoded,
    *,
    batch_size: int = 16,
    wanted: Collection[str] | None = None,
    earlier: HeldReference | None = None,
) -> HeldReference:
    """As :func:`build_reference`, in memory: G·D numbers in the base's dtype for G gold tokens.

    Args:
        base, prefix, encoded, batch_size, wanted: as there.
        earlier: the same reference with fewer rows, which are taken over.
    """
    index, held = (dict(earlier.index), list(earlier.held)) if earlier else ({}, [])
    rows = [row for row in encoded.rows if wanted is None or row.example_id in wanted]
    missing = [row for row in rows if row.example_id not in index]
    rest = iter(missing)
    for counts in cut_by_tokens([(row.example_id, len(row.gold)) for row in missing], ROWS_PER_SHARD, TOKENS_PER_SHARD):
        index |= _places(len(held), counts)
        held.append(_hidden_of(base, prefix, list(islice(rest, len(counts))), batch_size, None))
    key = reference_key(base, encoded, batch_size)
    made = HeldReference(Path(), key, index, base.geometry.hidden_size, held=held)
    return made.known_from(earlier) if earlier else made


def make_shard(base: Base, prefix: Prefix, encoded: Encoded, reference: Reference, shard: int, batch_size: int) -> None:
    """Compute one shard of a reference again, of the same rows: on the same machine it gets the same bytes."""
    wanted = reference.rows_of(shard)
    by_id = {row.example_id: row for row in encoded.rows}
    hidden = _hidden_of(base, prefix, [by_id[i] for i in wanted], batch_size, None)
    write_tensors(reference.folder / shard_name(shard), {"hidden": hidden}, reference.key)


def _stored_shards(
    folder: Path, key: str, gold: dict[str, int], say: Callable[[str], None] | None
) -> list[list[tuple[str, int]]]:
    """(example id, gold tokens) of the rows of each shard; none without an index of this key. ``gold``: the tokens of
    every row that there can be.
    """
    try:
        shards = _shards_of(_read_index(folder, key))
        if any(gold.get(example_id) != count for shard in shards for example_id, count in shard):
            raise InputError("names other rows", where=str(folder / INDEX))
    except InputError as fault:
        if say and (folder / INDEX).is_file():
            say(f"warning: {fault.where}: {fault.what}; the reference is made again")
        return []
    return shards


def _read_index(folder: Path, key: str) -> dict[str, Any]:
    """The index. Raises InputError when it is not there, damaged, or of another reference than ``key`` names."""
    path = folder / INDEX
    try:
        stored = parsed_json(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"the reference cannot be read: {error}", where=str(path), fix="run kvopt run again") from None
    if not isinstance(stored, dict) or {"key", "rows", "hidden_size"} - stored.keys():
        raise InputError("is no index of a reference", where=str(path), fix="delete it and run kvopt run again")
    if not fits_checksum(stored):
        raise InputError(CHANGED, where=str(path), fix="run kvopt run again")
    if stored["key"] != key:
        raise InputError(
            "the reference belongs to another base, template or data set", where=str(folder), fix="run kvopt run again"
        )
    return stored


def _shards_of(stored: dict[str, Any]) -> list[list[tuple[str, int]]]:
    """(example id, gold tokens) of the rows of each shard; files of 0.1.0 say how many rows all but the last have."""
    try:
        rows = [(str(example_id), int(count)) for example_id, count in stored["rows"]]
        if "shards" in stored:
            ends = [0, *accumulate(stored["shards"])]
        else:
            ends = [*range(0, len(rows), stored["rows_per_shard"]), len(rows)]
        return [rows[start:end] for start, end in pairwise(ends)]
    except (TypeError, ValueError, KeyError):
        raise InputError("the index of the reference is damaged", where=INDEX, fix="run kvopt run again") from None


def _places(shard: int, counts: Sequence[tuple[str, int]]) -> dict[str, tuple[int, int, int]]:
    """The index entries of the rows of one shard."""
    ends = [0, *accumulate(count for _, count in counts)]
    return {example_id: (shard, *ends[i : i + 2]) for i, (example_id, _) in enumerate(counts)}  # type: ignore[misc]


def open_reference(folder: Path, key: str) -> Reference:
    """The stored reference, with the rows that it has. Raises InputError when it is not the one that ``key`` names, or
    damaged.
    """
    stored = _read_index(folder, key)
    index: dict[str, tuple[int, int, int]] = {}
    for shard, rows in enumerate(_shards_of(stored)):
        index |= _places(shard, rows)
        if stored_key(folder / shard_name(shard)) != key:
            raise InputError(
                "a shard of the reference is missing, damaged or another's", where=str(folder / shard_name(shard))
            )
    return Reference(folder, key, index, stored["hidden_size"])


def _hidden_of(base: Base, prefix: Prefix, rows: Sequence[Row], batch_size: int, progress: Progress | None) -> Tensor:
    """[G, D] on the CPU, filled batch by batch."""
    ends = [0, *accumulate(len(row.gold) for row in rows)]
    hidden = torch.empty(ends[-1], base.geometry.hidden_size, dtype=base.dtype)
    for batch in split(base, _hidden_of_batch, length_buckets(rows, batch_size), prefix, rows, progress=progress):
        for i, part in batch:
            hidden[ends[i] : ends[i + 1]] = part
    return hidden


def _hidden_of_batch(base: Base, index: list[int], prefix: Prefix, rows: Sequence[Row]) -> list[tuple[int, Tensor]]:
    states = batch_states(base, prefix, rows, index)
    if not torch.isfinite(states.hidden).all():
        first = rows[index[0]].example_id
        raise KvoptError(f"the base gives values that are not finite on {first} or its batch; try float32")
    return list(states.split(states.hidden.cpu()))
