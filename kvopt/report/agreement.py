"""Rank agreement of forward KL with the pre-update loss (gold NLL): would choosing by either choose the same?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

from kvopt.documents.leaderboard_file import LeaderboardDocument
from kvopt.documents.scores_file import SplitScores
from kvopt.report.choice import on_selection, rivals

FEWEST = 3
CHANCE = 0.05  # p-value above which a correlation is not told apart from chance
ALIKE, SOME = 0.7, 0.3  # rank correlations from which on two orders are called alike, or partly so


def rank_agreements(board: LeaderboardDocument) -> list[dict[str, Any]]:
    """Spearman's ρ and Kendall's τ-b with their p-values over mutations on the selection rows, and over all contexts
    but the original and "no context" on the validation rows.

    Each has ``over``, ``split``, ``n``, ``points``, and the four values, which are None for fewer than three contexts
    or where all are equal.
    """
    reported = [(row.name, row) for row in rivals(board)]
    return [
        _agreement("mutations", "selection", on_selection(board)),
        _agreement("contexts", "validation", reported),
    ]


def _agreement(over: str, split: str, scored: Sequence[tuple[str, SplitScores]]) -> dict[str, Any]:
    points = [{"name": n, "kl_forward": s.kl_forward.mean, "gold_nll": s.gold_nll} for n, s in scored]
    values: dict[str, float | None] = dict.fromkeys(("spearman", "spearman_p", "kendall", "kendall_p"))
    if len(points) >= FEWEST:
        from scipy.stats import ConstantInputWarning, kendalltau, spearmanr

        kl, nll = [p["kl_forward"] for p in points], [p["gold_nll"] for p in points]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConstantInputWarning)
            correlations = {"spearman": spearmanr(kl, nll), "kendall": kendalltau(kl, nll)}
        for name, result in correlations.items():
            values |= {name: _finite(result.statistic), f"{name}_p": _finite(result.pvalue)}
    words = in_words(values["spearman"], values["spearman_p"])
    return {"over": over, "split": split, "n": len(points), "points": points, **values, "in_words": words}


def in_words(rho: float | None, p: float | None) -> str:
    """What a rank correlation means for choosing."""
    if rho is None or p is None:
        return "too few, or all equal, for a rank correlation"
    if p > CHANCE:
        return "not told apart from chance"
    if rho >= ALIKE:
        return "both rank them alike"
    if rho >= SOME:
        return "both rank them alike in part"
    if rho > -SOME:
        return "one order says little about the other"
    return "they rank them in opposite order: the one with the lower loss tends to be further from the template"


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
