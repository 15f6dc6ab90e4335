"""What the page shows of students: results by group of contexts, robustness to wordings, habits, and forgetting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from kvopt.report.evaluation import BASE, Evaluation, Measured, group_table, shown_quantities
from kvopt.report.pictures import Mark, interval_strips

WORDINGS = ("original", "held-out", "templates")


@dataclass(frozen=True)
class StudentsView:
    """The students' part of the page; pictures are None where there is nothing to draw."""

    evaluations: Sequence[Evaluation]
    tables: Sequence[dict[str, Any]]
    robustness: Sequence[tuple[str, Markup]]
    forgetting: Sequence[tuple[str, Markup]]
    habits: bool


def students_view(evaluations: Sequence[Evaluation]) -> StudentsView:
    """Tables and pictures of the students of one run."""
    quantities = shown_quantities(evaluations)
    return StudentsView(
        evaluations,
        [group_table(evaluations, quantity) for quantity in quantities],
        [
            (quantity, picture)
            for position, quantity in enumerate(quantities[:3])
            if (picture := _robustness(evaluations, quantity, f"robust-{position}"))
        ],
        [
            (words, picture)
            for name, words in (
                ("kl_from_base", "KL from the base on prompts of other kinds, nats per gold token"),
                ("gold_nll_change", "change of gold NLL on prompts of other kinds, nats per gold token"),
            )
            if (picture := _forgetting(evaluations, name, words))
        ],
        any(one.no_context or one.frozen_prompt for one in evaluations),
    )


def _robustness(evaluations: Sequence[Evaluation], quantity: str, id: str) -> Markup | None:
    """Each student's mean over wordings with its interval, and a small mark for each wording."""
    marks = []
    for one in evaluations:
        dots = [
            value.mean
            for condition in one.contexts
            if condition.group in WORDINGS and (value := condition.quantities.get(quantity)) and value.mean is not None
        ]
        group = one.group("wordings") or one.group("original")
        mark = _mark(one.name, group.quantities.get(quantity) if group else None, tuple(dots))
        marks += [mark] if mark else []
    return interval_strips(marks, f"{quantity} over wordings", quantity, id=id) if marks else None


def _forgetting(evaluations: Sequence[Evaluation], name: str, words: str) -> Markup | None:
    found = [
        mark
        for one in evaluations
        if one.forgetting and one.name != BASE and (mark := _mark(one.name, getattr(one.forgetting, name), ()))
    ]
    return interval_strips(found, f"Forgetting: {words}", words, id=f"forgetting-{name}", zero=True) if found else None


def _mark(label: str, value: Measured | None, dots: tuple[float, ...]) -> Mark | None:
    if value is None or value.mean is None:
        return None
    low, high = value.ci95 or (None, None)
    return Mark(label, value.mean, low, high, dots, "text" if label == BASE else "kv")
