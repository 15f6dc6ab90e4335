"""What the page shows of students: results by group of contexts, robustness to wordings, habits, and forgetting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from kvopt.documents.evaluation_file import BASE, WORDINGS, EvaluationDocument, GroupEstimate
from kvopt.documents.part import Estimate
from kvopt.report.choice import shown_interval
from kvopt.report.pictures import Mark, interval_strips

GROUPS = ("original", "held-out", "templates", "wordings", "none", "learned")
ALWAYS = ("gold_nll", "kl_from_base", "top1_agreement")  # quantities of every evaluation


@dataclass(frozen=True)
class StudentsView:
    """The students' part of the page; pictures are None where there is nothing to draw."""

    evaluations: Sequence[EvaluationDocument]
    tables: Sequence[dict[str, Any]]
    robustness: Sequence[tuple[str, Markup]]
    forgetting: Sequence[tuple[str, Markup]]
    habits: Sequence[tuple[str, Sequence[Estimate | None]]]


def students_view(evaluations: Sequence[EvaluationDocument]) -> StudentsView:
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
        known_habits(evaluations),
    )


def shown_quantities(evaluations: Sequence[EvaluationDocument]) -> list[str]:
    """Headlines of all evaluations, then what every evaluation has, as far as it was measured."""
    headlines = dict.fromkeys(name for one in evaluations for name in one.headlines)
    by_group = [group.quantities for one in evaluations for group in one.groups]
    known = {name for quantities in by_group for name, value in quantities.items() if value.mean is not None}
    return [
        *(name for name in headlines if name in known),
        *(name for name in ALWAYS if name in known and name not in headlines),
    ]


def group_table(evaluations: Sequence[EvaluationDocument], quantity: str) -> dict[str, Any]:
    """``groups`` (those that exist), and for each student a row: name, a value by group, and the wordings' spread."""
    groups = [name for name in GROUPS if any(_measured(one, name, quantity) for one in evaluations)]
    rows = []
    for one in evaluations:
        values = {name: group.quantities.get(quantity) if (group := one.group(name)) else None for name in groups}
        wordings = one.group("wordings")
        rows.append(
            {
                "name": one.name,
                "values": values,
                "spread": wordings.quantities.get(quantity) if wordings else None,
                "consistency": wordings.consistency if wordings else None,
            }
        )
    return {"quantity": quantity, "groups": groups, "rows": rows}


def _measured(one: EvaluationDocument, group: str, quantity: str) -> bool:
    found = one.group(group)
    value = found.quantities.get(quantity) if found else None
    return value is not None and value.mean is not None


def known_habits(evaluations: Sequence[EvaluationDocument]) -> list[tuple[str, list[Estimate | None]]]:
    """What models do without being asked, by heading, with a value for each; those that some model was measured for."""
    columns = []
    for part, situation in (("no_context", "no context"), ("frozen_prompt", "other instruction")):
        for share, words in (("same_as_original", "as under the original"), ("looks_like_task", "looks like the task")):
            values = [getattr(getattr(one, part), share, None) for one in evaluations]
            if any(value is not None and value.mean is not None for value in values):
                columns.append((f"{situation}: {words}", values))
    return columns


def _robustness(evaluations: Sequence[EvaluationDocument], quantity: str, id: str) -> Markup | None:
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


def _forgetting(evaluations: Sequence[EvaluationDocument], name: str, words: str) -> Markup | None:
    strips = [
        mark
        for one in evaluations
        if one.forgetting and one.name != BASE and (mark := _mark(one.name, getattr(one.forgetting, name), ()))
    ]
    if not strips:
        return None
    return interval_strips(strips, f"Forgetting: {words}", words, id=f"forgetting-{name}", zero=True)


def _mark(label: str, value: Estimate | GroupEstimate | None, dots: tuple[float, ...]) -> Mark | None:
    if value is None or value.mean is None:
        return None
    low, high = shown_interval(value.ci95) or (None, None)
    return Mark(label, value.mean, low, high, dots, "text" if label == BASE else "kv")
