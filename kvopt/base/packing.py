"""Rows of different lengths side by side in one line of a batch, so that little is computed on padding.

A line holds whole rows one after the other. Each row has positions of its own, from the prefix's end on, and a mask
[B, 1, n, T + n] lets a token attend to the prefix and to the tokens of its own row before it. What a row gives is the
same as in a padded batch, but for the order of sums.

Symbols: R rows, B lines, n positions of a line, T prefix slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_SAVED = 0.05
"""Share of the work that packing must save: below, rows are padded as they are."""

LINEAR_SLOTS = 768
"""Attended slots that cost a token as much as all other layers do (SmolLM2-135M on a CPU; larger models: more)."""


@dataclass(frozen=True)
class Packing:
    """Where rows stand: the line and the first column of each [R], and how many lines of which width there are."""

    line: Tensor
    column: Tensor
    lengths: Tensor
    lines: int
    width: int

    def packed(self, ids: Tensor) -> Tensor:
        """Token ids [B, n] of rows [R, ·] that are padded on the right."""
        rows, within, lines, columns = self._tokens()
        out = ids.new_zeros(self.lines, self.width)
        out[lines, columns] = ids[rows, within]
        return out

    def positions(self, start: int) -> Tensor:
        """[B, n] positions of tokens, each row's from ``start`` on."""
        _, within, lines, columns = self._tokens()
        out = torch.full((self.lines, self.width), start)
        out[lines, columns] = within + start
        return out

    def mask(self, prefix: int) -> Tensor:
        """[B, 1, n, T + n] bool: what each token attends to; padding attends to the prefix and to padding."""
        rows, _, lines, columns = self._tokens()
        owner = torch.full((self.lines, self.width), -1)
        owner[lines, columns] = rows
        own = (owner[:, :, None] == owner[:, None, :]).tril_()
        return torch.cat([own.new_ones(self.lines, self.width, prefix), own], -1)[:, None]

    def places(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """(line, column) of tokens that are given by row and column in it."""
        return self.line[rows], self.column[rows] + columns

    def _tokens(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Row, column in the row, line and column in the line of every token."""
        rows = torch.repeat_interleave(self.lengths)
        within = torch.cat([torch.arange(length) for length in self.lengths.tolist()])
        return rows, within, *self.places(rows, within)


def pack(lengths: Sequence[int], prefix: int) -> Packing | None:
    """The packing of rows after ``prefix`` slots that costs least, or None where padding them costs no more."""
    longest = max(lengths)
    widths = sorted({longest + extra for extra in (0, *lengths) if longest + extra <= 2 * longest})
    packings = [_first_fit(lengths, width) for width in widths]
    best = min(packings, key=lambda packing: _cost(packing.lines, packing.width, prefix))
    padded = _cost(len(lengths), longest, prefix)
    return best if _cost(best.lines, best.width, prefix) < (1 - LEAST_SAVED) * padded else None


def _cost(lines: int, width: int, prefix: int) -> int:
    """In token slots attended to."""
    return lines * width * (LINEAR_SLOTS + prefix + width)


def _first_fit(lengths: Sequence[int], width: int) -> Packing:
    """The longest rows first, each in the first line that has room for it."""
    used: list[int] = []
    line, column = [0] * len(lengths), [0] * len(lengths)
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        place = next((i for i, taken in enumerate(used) if taken + lengths[row] <= width), len(used))
        if place == len(used):
            used.append(0)
        line[row], column[row] = place, used[place]
        used[place] += lengths[row]
    return Packing(torch.tensor(line), torch.tensor(column), torch.tensor(lengths), len(used), max(used))
