"""Scores of a context: how far the base after it is from the base after the original template, on gold tokens.

Forward KL is KL[p(·|V,C) ‖ p(·|V,C')] in nats per gold token; gold NLL is −log p(Y|V,C') in nats per gold token,
SAPO's pre-update loss. The same code scores text, soft and KV contexts: one prefix, then bodies in length-bucketed
batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import reduce
from torch import Tensor

from kvopt.base.launch import split
from kvopt.base.loading import Base
from kvopt.base.prefix import Prefix, batch_states
from kvopt.contexts.context import Context
from kvopt.documents.scores_file import ForwardKL, SplitScores
from kvopt.errors import InputError
from kvopt.kernels import Head, KLOptions, linear_scores
from kvopt.measure.bootstrap import bounds, drawn_rows
from kvopt.measure.reference import Reference
from kvopt.storage.tensors import read_tensors, write_tensors
from kvopt.task.seam import Encoded, Row, length_buckets

SCORES_VERSION = 1
"""Raise it when the same inputs give other scores."""
Progress = Callable[[int], None]


@dataclass(frozen=True)
class TokenScores:
    """Per gold token, [G] each, in the order of the rows; ``counts`` [N] int64 are the gold tokens of each row.

    kl: forward KL, float32 nats. nll: −log q of the gold token, float32 nats. agree: bool, same most likely token as
        the reference.
    """

    kl: Tensor
    nll: Tensor
    agree: Tensor
    counts: Tensor

    def write(self, path: Path, key: str) -> None:
        """Store the arrays; ``key`` says what they belong to."""
        write_tensors(path, {name: getattr(self, name) for name in ("kl", "nll", "agree", "counts")}, key)

    @classmethod
    def read(cls, path: Path) -> TokenScores:
        """The arrays of :meth:`write`. Raises InputError for a damaged file."""
        tensors = read_tensors(path)
        if tensors.keys() != {"kl", "nll", "agree", "counts"}:  # of a version without a checksum
            raise InputError("is damaged: it holds other tensors", where=str(path))
        return cls(**tensors)

    def by_example(self, values: Tensor) -> Tensor:
        """Sums of a per-token array over each row, [N] float64."""
        return torch.stack([part.double().sum() for part in values.split(self.counts.tolist())])


@dataclass(frozen=True)
class Interval:
    """A mean per gold token, with a bootstrap 95 % interval over examples (None for fewer than two examples)."""

    mean: float
    ci95: tuple[float, float] | None


@dataclass(frozen=True)
class Score:
    """A context's numbers on one split. p95 is the 95th percentile of forward KL over gold tokens."""

    kl_forward: Interval
    kl_forward_p95: float
    gold_nll: Interval
    top1_agreement: float
    examples: int
    gold_tokens: int

    @property
    def document(self) -> SplitScores:
        """These numbers as documents hold them."""
        return SplitScores(
            kl_forward=ForwardKL(mean=self.kl_forward.mean, ci95=self.kl_forward.ci95, p95=self.kl_forward_p95),
            gold_nll=self.gold_nll.mean,
            gold_nll_ci95=self.gold_nll.ci95,
            top1_agreement=self.top1_agreement,
            examples=self.examples,
            gold_tokens=self.gold_tokens,
        )

    def to_json(self) -> dict[str, Any]:
        """The entries of ``kvopt score --json``."""
        return self.document.to_json()


def score_tokens(
    base: Base,
    context: Context,
    original: Encoded,
    reference: Reference,
    *,
    batch_size: int = 16,
    options: KLOptions | None = None,
    progress: Progress | None = None,
) -> TokenScores:
    """Score one context on the rows of ``original``.

    Args:
        base: the frozen model.
        context: what to score.
        original: the rows to score, as encoded under the original template.
        reference: the stored reference, which must hold these rows.
        batch_size: bodies a batch.
        options: of the divergence op.
        progress: called with the number of rows finished.
    """
    with torch.no_grad():
        return score_prefix(
            base,
            context.prefix(base),
            context.bodies(original).rows,
            reference,
            batch_size=batch_size,
            options=options,
            progress=progress,
        )


@torch.no_grad()
def own_scores(base: Base, rows: Sequence[Row], reference: Reference, *, batch_size: int = 16) -> TokenScores:
    """The original template against its own reference, by the stored states alone: no forward pass, and a KL of 0."""
    parts = []
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        ids = [row.example_id for row in batch]
        stored, facts = reference.hidden(ids).to(base.device), reference.facts(ids, base.head)
        gold = torch.tensor([token for row in batch for token in row.gold], device=base.device)
        parts.append(linear_scores(stored, stored, base.head, gold, None, base.head, facts))
    kl, nll, agree = (torch.cat([getattr(part, name).cpu() for part in parts]) for name in ("kl", "nll", "agree"))
    return TokenScores(kl, nll, agree, torch.tensor([len(row.gold) for row in rows]))


@torch.no_grad()
def score_prefix(
    base: Base,
    prefix: Prefix,
    rows: Sequence[Row],
    reference: Reference,
    *,
    batch_size: int = 16,
    options: KLOptions | None = None,
    reference_head: Head | None = None,
    progress: Progress | None = None,
) -> TokenScores:
    """As :func:`score_tokens`, for a prefix and its rows; ``reference_head`` where the reference is another model's (a
    student scored against its base).
    """
    kl: list[Tensor] = [torch.empty(0)] * len(rows)
    nll, agree = list(kl), list(kl)
    batches, head = length_buckets(rows, batch_size), reference_head or base.head
    for scored in split(base, _scored, batches, prefix, rows, reference, options, head, progress=progress):
        for i, *parts in scored:
            kl[i], nll[i], agree[i] = parts
    counts = torch.tensor([len(row.gold) for row in rows])
    return TokenScores(torch.cat(kl), torch.cat(nll), torch.cat(agree), counts)


@torch.no_grad()
def _scored(
    base: Base,
    index: list[int],
    prefix: Prefix,
    rows: Sequence[Row],
    reference: Reference,
    options: KLOptions | None,
    head: Head,
) -> list[tuple[int, Tensor, Tensor, Tensor]]:
    """The place, KL, NLL and agreement of each row of one batch."""
    states = batch_states(base, prefix, rows, index)
    ids = [rows[i].example_id for i in index]
    stored, facts = reference.hidden(ids).to(base.device), reference.facts(ids, head, options)
    scores = linear_scores(states.hidden, stored, base.head, states.gold, options, head, facts)
    by_row = (values.cpu().split(states.counts) for values in (scores.kl, scores.nll, scores.agree))
    return list(zip(index, *by_row, strict=True))


def summarize(scores: TokenScores, *, seed: int = 0, resamples: int = 2000) -> Score:
    """Means per gold token with bootstrap intervals over examples (percentile method, ``resamples`` draws)."""
    draws = drawn_rows(len(scores.counts), seed, resamples)
    return Score(
        kl_forward=_interval(scores, scores.kl, draws),
        kl_forward_p95=float(np.percentile(scores.kl.numpy(), 95)),
        gold_nll=_interval(scores, scores.nll, draws),
        top1_agreement=float(reduce(scores.agree.double(), "g ->", "mean")),
        examples=len(scores.counts),
        gold_tokens=int(scores.counts.sum()),
    )


def _interval(scores: TokenScores, values: Tensor, draws: np.ndarray) -> Interval:
    """``draws``: [resamples, N] positions of examples."""
    sums, counts = scores.by_example(values).numpy(), scores.counts.double().numpy()
    mean = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return Interval(mean, None)
    low, high = bounds(sums[draws].sum(-1) / counts[draws].sum(-1))
    return Interval(mean, (float(low), float(high)))
