"""Gold NLL of a base or student after a context: the loss before any update, which needs no reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvopt.base.loading import Base
from kvopt.base.prefix import gold_states
from kvopt.contexts import Context
from kvopt.kernels import linear_scores
from kvopt.task.seam import Encoded


@dataclass(frozen=True)
class GoldNLL:
    """Sums of −log q over the gold tokens of each row, [N] float64 nats, and their counts, [N] int64."""

    sums: Tensor
    counts: Tensor

    @property
    def mean(self) -> float:
        """Nats per gold token over all rows."""
        return float(self.sums.sum() / self.counts.sum())


@dataclass(frozen=True)
class HeldOut:
    """Rows that are not trained on, and the context that they stand after."""

    context: Context
    rows: Encoded

    def nll(self, student: Base, batch_size: int) -> float:
        """The student's gold NLL on them, nats per gold token."""
        return gold_nll(student, self.context, self.rows, batch_size=batch_size).mean


@torch.no_grad()
def gold_nll(
    base: Base,
    context: Context,
    original: Encoded,
    *,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> GoldNLL:
    """−log q(Y | V, C') of the rows of ``original``, in their order.

    Args:
        base: the base, or a student in its place; text contexts are prefilled by it.
        context: what stands in front of the bodies.
        original: at least one row, as encoded under the original template (bare bodies for soft and KV contexts).
        batch_size: bodies a batch.
        progress: called with the number of rows finished.
    """
    prefix, rows = context.prefix(base), context.bodies(original).rows
    sums = torch.zeros(len(rows), dtype=torch.float64)
    for states in gold_states(base, prefix, rows, batch_size=batch_size, progress=progress):
        nll = linear_scores(states.hidden, states.hidden, base.head, states.gold).nll.double().cpu()
        for i, part in states.split(nll):
            sums[i] = part.sum()
    return GoldNLL(sums, torch.tensor([len(row.gold) for row in rows]))
