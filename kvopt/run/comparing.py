"""Contexts of a leaderboard compared in pairs, row by row."""

from __future__ import annotations

import numpy as np

from kvopt.documents.choosing import BUILT_IN, choice
from kvopt.documents.leaderboard_file import Difference, LeaderboardDocument, LeaderboardRow
from kvopt.measure.paired import LEVEL, PairedDifference, holm, optimism, paired_difference
from kvopt.run.directory import Workspace
from kvopt.run.encoded_task import EncodedTask
from kvopt.run.scoring import stored_scores

Rows = tuple[np.ndarray, np.ndarray]
"""Sums of the forward KL over the gold tokens of each row, and how many these are, [N] each."""


def compare(board: LeaderboardDocument, task: EncodedTask, at: Workspace) -> None:
    """Set what a board says of pairs: which context is recommended, how far each is from it and whether it can be told
    from the closest one, and what picking by this table costs. A board that is not complete says only the first.
    """
    chosen = choice(board)
    board.recommended = chosen.recommended
    board.picking = None
    for row in board.contexts:
        for name in ("difference", "separable_from_best"):
            setattr(row, name, None)
            row.model_fields_set.discard(name)
    if not board.complete or chosen.closest is None:
        return
    settings = task.config.score
    seed, resamples = task.config.seed, settings.resamples
    rows = {row.name: sums for row in board.contexts if (sums := _sums(row, at, settings.batch_size)) is not None}
    rivals = [row for row in board.contexts if row.name != "original"]

    def differences(to: str) -> tuple[list[LeaderboardRow], list[PairedDifference | None], list[float | None]]:
        others = [row for row in rivals if row.name != to]
        found = [_difference(rows, row.name, to, seed, resamples) for row in others]
        return others, found, holm([one.p if one is not None else None for one in found])

    closest, recommended = chosen.closest.name, chosen.recommended or ""
    to = {name: differences(name) for name in {closest, recommended}}
    for row, _, p in zip(*to[closest], strict=True):
        row.separable_from_best = None if p is None else p <= LEVEL
    for row, found, p in zip(*to[recommended], strict=True):
        if found is not None:
            row.difference = Difference(to=recommended, mean=found.mean, ci95=found.ci95, p=p)
    picked = [rows[row.name] for row in rivals if row.name in rows and row.name not in BUILT_IN]
    if len(picked) > 1 and all(np.array_equal(counts, picked[0][1]) for _, counts in picked):
        board.picking = optimism(np.stack([sums for sums, _ in picked]), picked[0][1], seed=seed, resamples=resamples)


def _sums(row: LeaderboardRow, at: Workspace, batch_size: int) -> Rows | None:
    """None where what is stored is not what the board's row was made of."""
    scores = stored_scores(row.name, "validation", at, batch_size)
    if scores is None:
        return None
    sums, counts = scores.by_example(scores.kl).numpy(), scores.counts.numpy()
    same = np.isclose(sums.sum() / counts.sum(), row.kl_forward.mean, rtol=1e-6, atol=1e-12)
    return (sums, counts) if same else None


def _difference(rows: dict[str, Rows], first: str, second: str, seed: int, resamples: int) -> PairedDifference | None:
    if first not in rows or second not in rows or not np.array_equal(rows[first][1], rows[second][1]):
        return None
    (a, counts), (b, _) = rows[first], rows[second]
    return paired_difference(a, b, counts, seed=seed, resamples=resamples)
