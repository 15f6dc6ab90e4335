"""Gold likelihoods of a student: teacher-forced, without generation, by the divergence op.

For each gold token: nll = −log pθ(y | V, C'), kl = KL[p0(·|V,C) ‖ pθ(·|V,C')] against the stored reference of the base
under the original template, and whether both have the same most likely token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvopt.base.loading import Base
from kvopt.base.prefix import Prefix
from kvopt.measure.reference import Reference
from kvopt.measure.score import score_prefix
from kvopt.task.seam import Row


@dataclass(frozen=True)
class RowLikelihood:
    """Sums over the gold tokens of one row, nats; ``agree`` counts tokens."""

    gold_tokens: int
    nll: float
    kl: float
    agree: int


def likelihoods(
    student: Base,
    base: Base,
    prefix: Prefix,
    rows: Sequence[Row],
    reference: Reference,
    *,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> list[RowLikelihood]:
    """One entry for each row, in order.

    Args:
        student: the model that reads prefix and rows.
        base: the model behind the reference; its head turns stored states into p0.
        prefix: what the rows stand after, as the student sees it.
        reference: must hold the rows.
        progress: called with the number of rows finished.
    """
    scores = score_prefix(
        student, prefix, rows, reference, batch_size=batch_size, reference_head=base.head, progress=progress
    )
    sums = [scores.by_example(values).tolist() for values in (scores.nll, scores.kl, scores.agree)]
    return [
        RowLikelihood(count, nll, kl, int(agree))
        for count, nll, kl, agree in zip(scores.counts.tolist(), *sums, strict=True)
    ]
