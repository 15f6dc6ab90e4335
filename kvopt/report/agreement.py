"""Rank agreement of forward KL with the pre-update loss (gold NLL): would choosing by either choose the same?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

from kvopt.report.choice import on_selection, rivals
from kvopt.report.reading import Board, Scores

FEWEST = 3


def rank_agreements(board: Board) -> list[dict[str, Any]]:
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


def _agreement(over: str, split: str, scored: Sequence[tuple[str, Scores]]) -> dict[str, Any]:
    points = [{"name": n, "kl_forward": s.kl_forward.mean, "gold_nll": s.gold_nll} for n, s in scored]
    values: dict[str, float | None] = dict.fromkeys(("spearman", "spearman_p", "kendall", "kendall_p"))
    if len(points) >= FEWEST:
        from scipy.stats import ConstantInputWarning, kendalltau, spearmanr

        kl, nll = [p["kl_forward"] for p in points], [p["gold_nll"] for p in points]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConstantInputWarning)
            found = {"spearman": spearmanr(kl, nll), "kendall": kendalltau(kl, nll)}
        for name, result in found.items():
            values |= {name: _finite(result.statistic), f"{name}_p": _finite(result.pvalue)}
    return {"over": over, "split": split, "n": len(points), "points": points, **values}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
