"""POSIX, length-normalised (Chatterjee et al. 2024, arXiv 2410.02185): how far the probability of an answer moves when
the same is asked in other words.

For wordings x_1 … x_W of a row's prompt and the model's answers y_1 … y_W to them, a row has the mean over ordered
pairs i ≠ j of |log p(y_j | x_i) − log p(y_j | x_j)| / L_j, where L_j counts the tokens of y_j: nats per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvopt.base.launch import split
from kvopt.base.loading import Base
from kvopt.base.prefix import Prefix, batch_states
from kvopt.config.metrics import Ratio
from kvopt.kernels import linear_scores
from kvopt.task.seam import Row, length_buckets


def log_probs(
    model: Base,
    prefix: Prefix,
    bodies: Sequence[Sequence[int]],
    answers: Sequence[Sequence[Sequence[int]]],
    *,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> list[list[float]]:
    """log p(answer | one wording) in nats, [row][answer].

    Args:
        prefix, bodies: the wording's prompt of each row.
        answers: ids of the answers to each row under every wording, [row][wording][token]; of an empty one it is 0.
    """
    places = [(i, j) for i, of_row in enumerate(answers) for j, answer in enumerate(of_row) if answer]
    rows = [Row(f"{i}/{j}", tuple(bodies[i]), tuple(answers[i][j])) for i, j in places]
    found = [[0.0] * len(of_row) for of_row in answers]
    for scored in split(model, _scored, length_buckets(rows, batch_size), prefix, rows, progress=progress):
        for row, value in scored:
            i, j = places[row]
            found[i][j] = value
    return found


@torch.no_grad()
def _scored(model: Base, index: list[int], prefix: Prefix, rows: Sequence[Row]) -> list[tuple[int, float]]:
    """The place and log probability of each answer of a batch."""
    states = batch_states(model, prefix, rows, index)
    nll = linear_scores(states.hidden, states.hidden, model.head, states.gold).nll.double().cpu()
    return [(row, -float(part.sum())) for row, part in states.split(nll)]


def posix(rows: Sequence[dict[str, Any]], wordings: Sequence[str]) -> list[Ratio]:
    """For each row, (sum over ordered pairs of these wordings, number of pairs).

    Args:
        rows: ``tokens`` by wording, and ``log_probs``: wording that asks → wording whose answer it is → nats.
    """
    ratios = []
    for row in rows:
        moved = [
            abs(row["log_probs"][asked][of] - row["log_probs"][of][of]) / row["tokens"][of]
            for asked in wordings for of in wordings if asked != of and row["tokens"][of]
        ]  # fmt: skip
        ratios.append((sum(moved), float(len(moved))))
    return ratios
