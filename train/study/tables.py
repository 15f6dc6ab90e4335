"""A study as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.markup import escape
from rich.table import Table

from kvopt.console.tables import plain_table
from kvopt.documents.study_file import (
    LIKELIHOOD,
    SHOWN_GROUPS,
    ArmDifference,
    ArmResult,
    CurveFit,
    ExplainedVariance,
    StudyDocument,
    compared_paths,
)
from kvopt.train.evaluation.tables import with_interval

NARROWEST = 8
"""Characters that a column of numbers keeps on a narrow terminal: [+0.123, stays whole."""


def tables(document: StudyDocument) -> list[Table]:
    """Scores and likelihoods of every arm, what was forgotten, and the fits."""
    shown = [*document.headlines, LIKELIHOOD]
    views = [_scores(document, quantity) for quantity in shown] + [_costs(document)]
    if any(row.against_reference for row in document.arms):
        views.append(_differences(document))
    if document.curve:
        views.append(_curve(document.curve))
    if any(document.sweep.values()):
        views.append(_sweep(document.sweep))
    return views


def _scores(document: StudyDocument, headline: str) -> Table:
    groups = [group for group in SHOWN_GROUPS if f"{group}/{headline}" in document.base_values]
    paths = [f"{group}/{headline}" for group in groups]
    over_all = [f"wordings/{headline}/spread"] + ["wordings/consistency"] * (headline != LIKELIHOOD)
    paths += [p for p in over_all if p in document.base_values]
    view = plain_table(
        escape(f"{document.name} · {headline}"),
        f"means over seeds {document.seeds} ± half of the interval ({document.interval}); "
        f"~ not separable from {document.reference}",
    )
    view.add_column("arm", overflow="fold", min_width=8)
    view.add_column("equal", no_wrap=True)
    for heading in [*groups, *(p.removeprefix("wordings/").replace(f"{headline}/", "") for p in paths[len(groups) :])]:
        view.add_column(escape(heading), justify="right", overflow="fold", min_width=NARROWEST)
    view.add_row("base", "–", *(_number(document.base_values[path]) for path in paths), end_section=True)
    for row in document.arms:
        view.add_row(row.name, row.budget, *(_cell(row, path) for path in paths))
    return view


def _costs(document: StudyDocument) -> Table:
    paths = ["forgetting/kl_from_base", "forgetting/gold_nll_change", "original/kl_from_base"]
    paths += ["frozen_prompt/looks_like_task"]
    headings = ["probe KL", "probe NLL change", "task KL", "frozen prompt"]
    chosen = [(p, h) for p, h in zip(paths, headings, strict=True) if p in document.base_values]
    view = plain_table(
        "budgets and forgetting",
        "KL(base ‖ student) and NLL in nats per gold token; frozen prompt: share that still does the task",
    )
    view.add_column("arm", overflow="fold", min_width=8)
    for heading in ("equal", "steps", "tokens", "seconds"):
        view.add_column(heading, justify="right", no_wrap=True)
    for _, heading in chosen:
        view.add_column(heading, justify="right", overflow="fold", min_width=NARROWEST)
    for row in document.arms:
        costs = (row.budget, _whole(row.steps), _whole(row.tokens), _whole(row.seconds))
        view.add_row(row.name, *costs, *(_cell(row, path) for path, _ in chosen))
    return view


def _differences(document: StudyDocument) -> Table:
    reference = document.reference
    view = plain_table(f"differences from {reference}", f"arm − {reference}; intervals: {document.bootstrap}")
    view.add_column("arm", overflow="fold", min_width=8)
    view.add_column("equal", no_wrap=True)
    paths = compared_paths(document.headlines, document.base_values)
    for path in paths:
        view.add_column(escape(path.replace("/", "/\n", 1)), justify="right", overflow="fold", min_width=NARROWEST)
    for row in document.arms:
        if row.against_reference:
            differences = [row.against_reference.get(path) for path in paths]
            view.add_row(row.name, row.budget, *(_difference(one) for one in differences))
    return view


def _difference(difference: ArmDifference | None) -> str:
    if difference is None or difference.difference.mean is None:
        return "–"
    interval = difference.difference.ci95_bootstrap
    return f"{difference.difference.mean:+.3f}" + (f"\n[{interval[0]:+.3f}, {interval[1]:+.3f}]" if interval else "")


def _curve(curves: Mapping[str, CurveFit]) -> Table:
    view = plain_table(
        "the n-th mutation: a·m^(−b) + c over m = n + 1 wordings",
        "intervals: bootstrap over seeds; p: F test against a flat curve",
    )
    view.add_column("quantity", overflow="fold", min_width=8)
    counts = next(iter(curves.values())).counts
    for heading in (*(f"n={n}" for n in counts), "a", "b", "c", "R²", "p"):
        view.add_column(heading, justify="right", overflow="fold", min_width=len("0.339"))
    for path, curve in curves.items():
        means = [f"{sum(curve.values[n]) / len(curve.values[n]):.3f}" for n in counts]
        fit = [_fitted(curve, name) for name in "abc"] if curve.fit else ["no fit", "–", "–"]
        chance = "–" if curve.p is None else f"{curve.p:.2g}"
        view.add_row(escape(path), *means, *fit, _number(curve.r2), chance)
    return view


def _fitted(curve: CurveFit, name: str) -> str:
    low, high = getattr(curve.ci95, name) if curve.ci95 else (None, None)
    interval = "" if low is None else f" [{low:.3f}, {high:.3f}]"
    return f"{getattr(curve.fit, name):.3f}{interval}"


def _sweep(sweep: Mapping[str, ExplainedVariance | None]) -> Table:
    view = plain_table("what explains forgetting", "least squares; task KL: one point a student; contexts: one an arm")
    view.add_column("from → to", no_wrap=True)
    for heading in ("points", "slope", "R²", "p"):
        view.add_column(heading, justify="right", no_wrap=True)
    for name, fit in sweep.items():
        if fit is not None:
            cells = (str(fit.points), f"{fit.slope:.3g}", f"{fit.r2:.2f}", f"{fit.p:.2g}")
            view.add_row(name.replace("_to_", " → ").replace("_", " "), *cells)
    return view


def _cell(row: ArmResult, path: str) -> str:
    value = row.values.get(path)
    if value is None:
        return "–"
    against = (row.against_reference or {}).get(path)
    alike = against is not None and against.separable is False
    return with_interval(value, between="~ " if alike else " ")


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
