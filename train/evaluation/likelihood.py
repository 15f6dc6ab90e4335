"""Gold likelihoods of a student: teacher-forced, without generation, by the divergence op.

For each gold token: nll = −log pθ(y | V, C'), kl = KL[p0(·|V,C) ‖ pθ(·|V,C')] against the stored reference of the base
under the original template, and whether both have the same most likely token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kvopt.attention import Prefix, gold_hidden
from kvopt.encoding import Row, length_buckets, make_batch
from kvopt.kernels import linear_scores
from kvopt.model import Base
from kvopt.reference import Reference

Progress = Callable[[int], None]


@dataclass(frozen=True)
class RowLikelihood:
    """Sums over the gold tokens of one row, nats; ``agree`` counts tokens."""

    gold_tokens: int
    nll: float
    kl: float
    agree: int


@torch.no_grad()
def likelihoods(
    student: Base,
    base: Base,
    prefix: Prefix,
    rows: Sequence[Row],
    reference: Reference,
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> list[RowLikelihood]:
    """One entry for each row, in order.

    Args:
        student: the model that reads prefix and rows.
        base: the model behind the reference; its head turns stored states into p0.
        prefix: what the rows stand behind, as the student sees it.
        reference: must hold the rows.
        progress: called with the number of rows finished.
    """
    found: list[RowLikelihood | None] = [None] * len(rows)
    for index in length_buckets(rows, batch_size):
        batch = make_batch(rows, index).to(student.device)
        hidden = gold_hidden(student, prefix, batch)
        stored = reference.hidden([rows[i].example_id for i in index]).to(student.device)
        scores = linear_scores(hidden, stored, student.head, batch.gold, reference_head=base.head)
        sizes = [len(rows[i].gold) for i in index]
        parts = [values.cpu().split(sizes) for values in (scores.nll, scores.kl, scores.agree)]
        for i, nll, kl, agree in zip(index, *parts, strict=True):
            found[i] = RowLikelihood(len(nll), float(nll.double().sum()), float(kl.double().sum()), int(agree.sum()))
        if progress:
            progress(len(index))
    return [one for one in found if one is not None]
