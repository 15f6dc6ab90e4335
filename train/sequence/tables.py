"""A sequence as tables for a terminal."""

from __future__ import annotations

from rich.table import Table

from kvopt.console.tables import plain_table
from kvopt.documents.sequence_file import SequenceDocument

LOSSES = ("gold_nll", "kl_from_base", "answer_cut")
"""Quantities that are better when they are lower."""


def tables(document: SequenceDocument) -> list[Table]:
    """The last row of R with AP, BWT and FWT for each headline and the gold NLL; then what each stage trained on."""
    shown = [*document.headlines, *(q for q in ("gold_nll",) if q in document.quantities)]
    return [*(_scores(document, quantity) for quantity in shown), _choices(document)]


def _scores(document: SequenceDocument, quantity: str) -> Table:
    better = "lower" if quantity in LOSSES else "higher"
    forgotten = "over" if quantity in LOSSES else "under"
    view = plain_table(
        f"{document.name} · {quantity}",
        f"after the last stage; {better} is better; a BWT {forgotten} 0 is forgetting",
    )
    view.add_column("arm", overflow="fold", min_width=8)
    for heading in (*document.tasks, "AP", "BWT", "FWT"):
        view.add_column(heading, justify="right", overflow="fold")
    first = document.arms[0].R[quantity][0]
    view.add_row("base", *map(_number, first), *("–",) * 3, end_section=True)
    for arm in document.arms:
        means = arm.transfer[quantity]
        ends = (means.AP, means.BWT, means.FWT) if means else (None,) * 3
        view.add_row(arm.name, *map(_number, arm.R[quantity][-1]), *map(_number, ends))
    return view


def _choices(document: SequenceDocument) -> Table:
    view = plain_table("stages", "gold NLL: of the first kept context, before the stage's first update")
    view.add_column("arm", overflow="fold", min_width=8)
    for heading, justify in (("task", "left"), ("trained on", "left"), ("of", "right"), ("gold NLL", "right")):
        view.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for heading in ("steps", "tokens"):
        view.add_column(heading, justify="right")
    for arm in document.arms:
        for stage in arm.stages:
            nll = stage.gold_nll[stage.kept[0]] if stage.gold_nll else None
            kept, pool = ", ".join(stage.kept), str(len(stage.contexts))
            costs = (str(stage.steps), str(stage.tokens))
            last = stage is arm.stages[-1]
            view.add_row(arm.name, stage.task, kept, pool, _number(nll), *costs, end_section=last)
    return view


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
