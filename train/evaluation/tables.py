"""Evaluations as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from kvopt.console.tables import has_width, plain_table
from kvopt.documents.evaluation_file import EvaluationDocument, GroupEstimate, GroupResult
from kvopt.documents.part import Estimate
from kvopt.errors import counted

NO_METRIC = ("answer_cut", "gold_nll", "kl_from_base", "top1_agreement")
"""Quantities of an evaluation that no metric of the config measures."""
OF_PROBES, PROBED = ("probe KL(base ‖ model)", "probe NLL", "change"), "probe prompts: nats per gold token"
SHARES, TASK_LIKE = ("frozen prompt", "no context"), "shares of answers that still look like the task's"
"""Columns of the table of forgetting, and what its caption says of them."""


def tables(documents: Sequence[EvaluationDocument]) -> list[Table]:
    """Answers by group of contexts, what metrics say beside their headlines, how steady answers are over wordings, then
    what was forgotten.
    """
    tables = [answers_table(documents)]
    if further_quantities(documents):
        tables.append(metrics_table(documents))
    if any(_wordings(document) for document in documents):
        tables.append(steadiness_table(documents))
    if any(document.forgetting or document.frozen_prompt or document.no_context for document in documents):
        tables.append(forgetting_table(documents))
    return tables


def answers_table(documents: Sequence[EvaluationDocument]) -> Table:
    """One line for each model and group."""
    headlines, rows = documents[0].headlines, documents[0].rows
    view = plain_table(
        f"answers to {counted(rows.answered, 'validation row')}, likelihoods of {rows.scored}",
        "means over the group's contexts; ± half of the 95 % interval over examples; spread: highest − lowest context",
    )
    view.add_column("model", overflow="fold", min_width=6)
    view.add_column("under", no_wrap=True)
    for heading in ("n", *(part for headline in headlines for part in (headline, "spread"))):
        view.add_column(escape(heading), justify="right", overflow="fold")
    for heading in ("agree", "gold NLL", "KL"):
        view.add_column(heading, justify="right", no_wrap=True)
    for document in documents:
        for group in document.groups:
            quantities = group.quantities
            cells = [escape(document.name), group.group, str(len(group.contexts))]
            for headline in headlines:
                cells += [with_interval(quantities[headline]), _plain(quantities[headline].spread, 3)]
            cells += [_mean(group.consistency, 2)]
            cells += [_plain(quantities[q].mean, 3) for q in ("gold_nll", "kl_from_base")]
            view.add_row(*cells, end_section=group is document.groups[-1])
    return view


def further_quantities(documents: Sequence[EvaluationDocument]) -> list[str]:
    """What the metrics measure of answers beside their headlines, such as the keys of a function's own dictionary."""
    known = [name for document in documents for name in document.quantities]
    return [name for name in dict.fromkeys(known) if name not in (*documents[0].headlines, *NO_METRIC)]


def metrics_table(documents: Sequence[EvaluationDocument]) -> Table:
    """One line for each model and group: every key of every metric that is no headline."""
    names = further_quantities(documents)
    view = plain_table("metrics beside the headlines", "means over the group's contexts; ± as above")
    view.add_column("model", overflow="fold", min_width=6)
    view.add_column("under", no_wrap=True)
    for name in names:
        view.add_column(escape(name), justify="right", overflow="fold")
    for document in documents:
        for group in document.groups:
            cells = [with_interval(group.quantities.get(name)) for name in names]
            end = group is document.groups[-1]
            view.add_row(escape(document.name), group.group, *cells, end_section=end)
    return view


def _wordings(document: EvaluationDocument) -> GroupResult | None:
    """The group of all wordings, where it has several."""
    group = document.group("wordings")
    return group if group is not None and len(group.contexts) > 1 else None


def steadiness_table(documents: Sequence[EvaluationDocument]) -> Table:
    """One line for each model and headline: over all wordings, the mean, the lowest, and what is kept."""
    measured = any(group.posix is not None for document in documents if (group := _wordings(document)))
    told = "kept: mean over wordings / under the original; near best: wordings at most 0.05 below the best"
    view = plain_table("steadiness over wordings", told + ("; POSIX: nats per token" if measured else ""))
    view.add_column("model", overflow="fold", min_width=6)
    view.add_column("metric", overflow="fold")
    for heading in ("n", "mean", "lowest", "near best", "kept", *(["POSIX"] if measured else [])):
        view.add_column(heading, justify="right", no_wrap=True)
    for document in documents:
        group = _wordings(document)
        for headline in document.headlines if group is not None else ():
            assert group is not None
            quantity = group.quantities[headline]
            cells = [str(len(group.contexts)), _plain(quantity.mean, 3), _plain(quantity.min, 3)]
            cells += [_plain(quantity.near_best, 2), with_interval(quantity.retention, 2)]
            cells += [with_interval(group.posix)] if measured else []
            end = headline == document.headlines[-1]
            view.add_row(escape(document.name), escape(headline), *cells, end_section=end)
    return view


def forgetting_table(documents: Sequence[EvaluationDocument]) -> Table:
    """One line for each model: probes, frozen prompts, no context. Without columns that no model has values for."""
    columns: dict[str, list[str]] = {}
    for document in documents:
        forgetting, frozen, bare = document.forgetting, document.frozen_prompt, document.no_context
        original = next((c for c in document.contexts if c.group == "original"), None)
        cells = {
            "probe KL(base ‖ model)": with_interval(forgetting.kl_from_base if forgetting else None, 4),
            "probe NLL": _mean(forgetting.gold_nll if forgetting else None, 3),
            "change": with_interval(forgetting.gold_nll_change if forgetting else None),
            "task KL": with_interval(original.quantities["kl_from_base"] if original else None),
            "frozen prompt": _mean(frozen.looks_like_task if frozen else None, 2),
            "no context": _mean(bare.looks_like_task if bare else None, 2),
        }
        for heading, cell in cells.items():
            columns.setdefault(heading, []).append(cell)
    known = {heading: cells for heading, cells in columns.items() if any(cell != "–" for cell in cells)}
    told = {PROBED if heading in OF_PROBES else TASK_LIKE if heading in SHARES else "" for heading in known} - {""}
    view = plain_table("forgetting", "; ".join(sorted(told)) or None)
    view.add_column("model", overflow="fold", min_width=6)
    for heading in known:
        view.add_column(heading, justify="right", overflow="fold")
    for document, *cells_of in zip(documents, *known.values(), strict=True):
        view.add_row(escape(document.name), *cells_of)
    return view


def with_interval(value: Estimate | GroupEstimate | None, digits: int = 3, *, between: str = "") -> str:
    """``0.461±0.042``, with ``between`` before the ±; a dash for what does not exist."""
    if value is None or value.mean is None:
        return "–"
    half = f"{between}±{(value.ci95[1] - value.ci95[0]) / 2:.{digits}f}" if value.ci95 and has_width(value.ci95) else ""
    return f"{value.mean:.{digits}f}{half}"


def _mean(value: Estimate | None, digits: int) -> str:
    return _plain(value.mean if value else None, digits)


def _plain(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
