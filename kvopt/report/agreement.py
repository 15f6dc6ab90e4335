"""Rank agreement of forward KL with the pre-update loss (gold NLL) and with the config's metrics: would choosing by
either choose the same?
"""

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


def headline_agreements(board: LeaderboardDocument) -> list[dict[str, Any]]:
    """Spearman's ρ of forward KL with each headline over the contexts that have both (``headline``, ``n``,
    ``spearman``, ``spearman_p``, ``in_words``). ρ is negative where contexts closer to the template score higher.
    """
    found = []
    for headline in board.headlines:
        known = [(row.kl_forward.mean, (row.metrics or {}).get(headline)) for row in rivals(board)]
        pairs = [(kl, value.mean) for kl, value in known if value is not None and value.mean is not None]
        rho, p, _, _ = _correlations([kl for kl, _ in pairs], [value for _, value in pairs])
        words = in_words_of_headline(rho, p)
        found.append({"headline": headline, "n": len(pairs), "spearman": rho, "spearman_p": p, "in_words": words})
    return found


def _agreement(over: str, split: str, scored: Sequence[tuple[str, SplitScores]]) -> dict[str, Any]:
    points = [{"name": n, "kl_forward": s.kl_forward.mean, "gold_nll": s.gold_nll} for n, s in scored]
    found = _correlations([s.kl_forward.mean for _, s in scored], [s.gold_nll for _, s in scored])
    values = dict(zip(("spearman", "spearman_p", "kendall", "kendall_p"), found, strict=True))
    words = in_words(values["spearman"], values["spearman_p"])
    return {"over": over, "split": split, "n": len(points), "points": points, **values, "in_words": words}


def _correlations(x: Sequence[float], y: Sequence[float]) -> tuple[float | None, ...]:
    """Spearman's ρ and its p-value, Kendall's τ-b and its p-value; None where they are not defined."""
    if len(x) < FEWEST:
        return (None,) * 4
    from scipy.stats import ConstantInputWarning, kendalltau, spearmanr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        spearman, kendall = spearmanr(x, y), kendalltau(x, y)
    return tuple(map(_finite, (spearman.statistic, spearman.pvalue, kendall.statistic, kendall.pvalue)))


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


def in_words_of_headline(rho: float | None, p: float | None) -> str:
    """What the rank correlation of KL with a headline means for choosing."""
    if rho is None or p is None:
        return "too few, or all equal, for a rank correlation"
    if p > CHANCE:
        return "not told apart from chance"
    if abs(rho) < SOME:
        return "the distance says little about this metric"
    strength = "" if abs(rho) >= ALIKE else ", in part"
    return f"contexts closer to the template score {'higher' if rho < 0 else 'lower'}{strength}"


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
