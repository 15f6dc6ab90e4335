"""The exact forward KL of shortened texts on some of the user's rows, none of them computed twice.

Every figure is of the text as it is written: rendered and tokenized again, never of loose token ids. Texts that begin
with the same tokens share their keys and values. Results are on disk at once, so that a search that was interrupted
goes on where it stopped.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kvopt.base.loading import Base
from kvopt.base.prefix import Prefix, empty_prefix, prefill_after
from kvopt.errors import InputError
from kvopt.measure.reference import Reference
from kvopt.measure.score import score_prefix
from kvopt.shorten.pieces import Pieces
from kvopt.storage.files import append_line, mend_last_line, parsed_json
from kvopt.task.examples import Example
from kvopt.task.seam import Encoded, Encoder, common_prefix

TRIALS_VERSION = 1
"""Raise it when the same inputs give another KL of a shortened text."""
TEXTS_KEPT = 256
STRIDE = 64
"""Texts are run in stretches of so many tokens, and texts that begin alike share whole stretches. So no bit depends on
which texts were tried before, and an interrupted search ends as one that was not.
"""
SLOTS_KEPT = 16_384
"""Tokens of texts whose keys and values are kept, for texts that begin alike and for more rows of the same."""


@dataclass
class Trials:
    """Scores texts that are made of a template's pieces.

    Args:
        pieces: the template, taken apart.
        examples: rows that decide, in the order in which they are used: the first ones see every candidate.
        gold: their gold ids by example id, which must result.
        journal: a file for the results, one line each; what belongs to another ``key`` is left out.
        batch_size: bodies run at once.

    Attributes:
        rows_run: rows that were run through the model so far, counted once for each text.
        tokens_run: their tokens, with those of texts that were not shared with the text before.
    """

    base: Base
    encoder: Encoder
    pieces: Pieces
    examples: Sequence[Example]
    gold: Mapping[str, tuple[int, ...]]
    reference: Reference
    journal: Path | None = None
    key: str = ""
    batch_size: int = 16
    rows_run: int = 0
    tokens_run: int = 0
    _asked: dict[str, int] = field(default_factory=dict)
    _texts: OrderedDict[frozenset[int], tuple[str, Encoded | None]] = field(default_factory=OrderedDict)
    _sums: dict[str, list[float]] = field(default_factory=dict)
    _prefixes: OrderedDict[tuple[int, ...], Prefix] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self._counts = [len(self.gold[example.id]) for example in self.examples]
        for line in self._lines():
            if line.get("key") == self.key:
                known = self._sums.setdefault(line["text"], [])
                if len(known) == line["from"]:
                    known += line["kl"]

    @property
    def rows_tried(self) -> int:
        """As ``rows_run``, with those that an interrupted search had run before."""
        return sum(self._asked.values())

    def _lines(self) -> list[dict[str, Any]]:
        """The journal's lines; one that was being written when the process died is cut off."""
        if self.journal is None or not self.journal.is_file():
            return []
        mend_last_line(self.journal)
        lines = []
        for number, line in enumerate(self.journal.read_bytes().splitlines(), 1):
            try:
                one = parsed_json(line)
                lines.append({"key": one["key"], "text": one["text"], "from": one["from"], "kl": list(one["kl"])})
            except (ValueError, KeyError, TypeError):
                where = f"{self.journal}:{number}"
                raise InputError("the line is damaged", where=where, fix="delete the file to start over") from None
        return lines

    def _written(self, kept: Collection[int]) -> tuple[str, Encoded | None]:
        """The hash of the text of these pieces, and the rows under it; None where the text changes a gold output's ids
        or is too long.
        """
        pieces = frozenset(kept)
        if pieces not in self._texts:
            template, window = self.pieces.written(pieces), self.base.geometry.window
            encoded = None
            with suppress(InputError):
                encoded = self.encoder.encode(template, self.examples, gold=self.gold, window=window)
            self._texts[pieces] = template.sha256, encoded
            if len(self._texts) > TEXTS_KEPT:
                self._texts.popitem(last=False)
        return self._texts[pieces]

    def tokens(self, kept: Collection[int]) -> int | None:
        """Length of the text before the seam, as the model reads it; None where the text changes a gold output's ids or
        is too long.
        """
        _, encoded = self._written(kept)
        return None if encoded is None else len(encoded.prefix)

    def kl(self, kept: Collection[int], rows: int | None = None) -> float:
        """Forward KL in nats per gold token on the first ``rows`` examples (default: all); infinite where
        :meth:`tokens` is None.
        """
        wanted = len(self.examples) if rows is None else min(rows, len(self.examples))
        key, encoded = self._written(kept)
        if encoded is None:
            return float("inf")
        known = self._sums.setdefault(key, [])
        self._asked[key] = max(wanted, self._asked.get(key, 0))
        if len(known) < wanted:
            self._run(key, encoded, known, wanted)
        return sum(known[:wanted]) / sum(self._counts[:wanted])

    def _run(self, key: str, encoded: Encoded, known: list[float], wanted: int) -> None:
        first = len(known)
        rows = encoded.rows[first:wanted]
        with torch.no_grad():
            scores = score_prefix(
                self.base, self._prefix(encoded.prefix), rows, self.reference, batch_size=self.batch_size
            )
        sums = scores.by_example(scores.kl).tolist()
        known += sums
        self.rows_run += len(rows)
        self.tokens_run += sum(map(len, rows))
        if self.journal is not None:
            append_line(self.journal, json.dumps({"key": self.key, "text": key, "from": first, "kl": sums}))

    def _prefix(self, ids: Sequence[int]) -> Prefix:
        """Keys and values of a text, from those of the kept one that it shares the most stretches with."""
        ids = tuple(ids)
        if ids in self._prefixes:
            return self._prefixes[ids]
        best, shared = empty_prefix(self.base), 0
        for other, prefix in self._prefixes.items():
            same = common_prefix([ids, other], min(len(ids), len(other))) // STRIDE * STRIDE
            if same > shared:
                best, shared = prefix, same
        result = best.first(shared)
        for start in range(shared, len(ids), STRIDE):
            stretch = torch.tensor(ids[start : start + STRIDE], dtype=torch.int64, device=self.base.device)
            result = prefill_after(self.base, result, stretch)
        self.tokens_run += len(ids) - shared
        self._prefixes[ids] = result
        self._prefixes.move_to_end(ids)
        while len(self._prefixes) > 1 and sum(map(len, self._prefixes)) > SLOTS_KEPT:
            self._prefixes.popitem(last=False)
        return result


def spread_order(examples: Sequence[Example], gold: Mapping[str, Sequence[int]]) -> list[Example]:
    """The examples in an order whose beginning covers many gold tokens: each next one has the most that none before
    it has, of equal ones the first.
    """
    left, seen, ordered = list(examples), set[int](), list[Example]()
    while left:
        best = max(left, key=lambda example: len(set(gold[example.id]) - seen))
        left.remove(best)
        ordered.append(best)
        seen |= set(gold[best.id])
        if all(set(gold[example.id]) <= seen for example in left):
            seen = set()
    return ordered
