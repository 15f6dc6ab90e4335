"""Rows of different lengths side by side in one line of a batch, so that little is computed on padding.

A line holds whole rows one after the other. Each row has positions of its own, from the prefix's end on, and a mask
[B, 1, n, T + n] lets a token attend to the prefix and to the tokens of its own row before it, in sliding layers to the
nearest of them. What a row gives is the same as in a padded batch, but for the order of sums.

Symbols: R rows, B lines, n positions of a line, T prefix slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

Mask = TypeVar("Mask")
LEAST_SAVED = 0.05
"""Share of the work that packing must save: below, rows are padded as they are."""

BLOCK = 128
"""Positions of a block of FlexAttention."""

LINEAR_SLOTS = 768
"""Attended slots that cost a token as much as all other layers do (SmolLM2-135M on a CPU; larger models: more)."""


@dataclass(frozen=True)
class Packing:
    """Where rows stand: the line and the first column of each [R], and how many lines of which width there are.

    in_blocks: one line whose width is a multiple of BLOCK, for FlexAttention. apart: one line without padding, whose
    rows attend to the prefix and to themselves apart (:mod:`kvopt.base.merged`).
    """

    line: Tensor
    column: Tensor
    lengths: Tensor
    lines: int
    width: int
    in_blocks: bool = False
    apart: bool = False

    def packed(self, ids: Tensor) -> Tensor:
        """Token ids [B, n] of rows [R, ·] that are padded on the right."""
        rows, within, lines, columns = self._tokens()
        out = ids.new_zeros(self.lines, self.width)
        to, of = ((t.to(ids.device) for t in pair) for pair in ((lines, columns), (rows, within)))
        out[tuple(to)] = ids[tuple(of)]
        return out

    def positions(self, start: int) -> Tensor:
        """[B, n] positions of tokens, each row's from ``start`` on; padding is at ``start``."""
        _, within, lines, columns = self._tokens()
        out = torch.full((self.lines, self.width), start)
        out[lines, columns] = within + start
        return out

    def owners(self) -> Tensor:
        """[B, n] the row that each token belongs to, -1 for padding."""
        rows, _, lines, columns = self._tokens()
        owner = torch.full((self.lines, self.width), -1)
        owner[lines, columns] = rows
        return owner

    def mask(self, prefix: int, window: int | None = None) -> Tensor:
        """[B, 1, n, T + n] bool: what each token attends to; padding attends to the prefix and to padding.

        Args:
            window: of a sliding layer: only so many positions are seen, the token's own among them.
        """
        owner = self.owners()
        own = (owner[:, :, None] == owner[:, None, :]).tril_()
        whole = torch.cat([own.new_ones(self.lines, self.width, prefix), own], -1)[:, None]
        if window is not None:
            queries = self.positions(prefix)
            keys = torch.cat([torch.arange(prefix).expand(self.lines, prefix), queries], -1)
            whole &= (queries[:, :, None] - keys[:, None, :] < window)[:, None]
        return whole

    def places(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """(line, column) of tokens that are given by row and column in it."""
        line, column = self.line.to(rows.device), self.column.to(rows.device)
        return line[rows], column[rows] + columns

    def _tokens(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Row, column in the row, line and column in the line of every token."""
        rows = torch.repeat_interleave(self.lengths)
        within = torch.cat([torch.arange(length) for length in self.lengths.tolist()])
        return rows, within, *self.places(rows, within)


def by_layer(layer_types: Sequence[str], window: int | None, make: Callable[[int | None], Mask]) -> Any:
    """The masks of a model, as transformers takes them: one where all layers are of one kind, else one for each kind by
    its name.

    Args:
        layer_types: full_attention or sliding_attention, for each layer.
        window: of the sliding ones.
        make: the mask for a window, or for none.
    """
    masks = {kind: make(window if kind == "sliding_attention" else None) for kind in dict.fromkeys(layer_types)}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def one_line(lengths: Sequence[int]) -> Packing:
    """All rows in one line, in their order; its width is a multiple of BLOCK."""
    packing = end_to_end(lengths)
    return replace(packing, width=-(-packing.width // BLOCK) * BLOCK, in_blocks=True, apart=False)


def end_to_end(lengths: Sequence[int]) -> Packing:
    """All rows in one line, in their order, and nothing else; they are apart from their prefix."""
    ends = list(accumulate(lengths))
    column = [end - length for end, length in zip(ends, lengths, strict=True)]
    line = torch.zeros(len(lengths), dtype=torch.int64)
    return Packing(line, torch.tensor(column), torch.tensor(lengths), 1, ends[-1], apart=True)


def pack(lengths: Sequence[int], prefix: int, *, always: bool = False) -> Packing | None:
    """The packing of rows after ``prefix`` slots that costs least, or None where padding them costs no more (never with
    ``always``).
    """
    longest = max(lengths)
    widths = sorted({longest + extra for extra in (0, *lengths) if longest + extra <= 2 * longest})
    packings = [_first_fit(lengths, width) for width in widths]
    best = min(packings, key=lambda packing: _cost(packing.lines, packing.width, prefix))
    padded = _cost(len(lengths), longest, prefix)
    return best if always or _cost(best.lines, best.width, prefix) < (1 - LEAST_SAVED) * padded else None


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
