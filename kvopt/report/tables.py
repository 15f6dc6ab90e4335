"""The leaderboard of a report as CSV and Markdown, and for several runs on a terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any

from rich.cells import cell_len
from rich.markup import escape
from rich.table import Table

from kvopt.console.tables import WIDTH_OF_FILES, plain_table
from kvopt.report.choice import number, shown_interval

COLUMNS = (
    "run", "name", "kind", "tokens", "kl_forward", "kl_forward_low", "kl_forward_high", "kl_forward_p95", "gold_nll",
    "top1_agreement", "share_kept", "pareto", "separable_from_best", "selection_kl_forward", "build_seconds",
    "build_tokens_in", "build_tokens_out", "build_model_calls", "build_shared_by", "operators", "students",
)  # fmt: skip

FOLDED = 16  # columns of a terminal from which on names of contexts are folded
STUDENTS = 3  # columns for students on a terminal; more of them stand on the page


def rows_of(report: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(run label, context) of every run, best first within each."""
    for run in report["runs"]:
        for row in run["contexts"]:
            yield run["label"], row


def to_csv(report: dict[str, Any]) -> str:
    """One line a context, with every column of :data:`COLUMNS` and the mean of each metric; text that a spreadsheet
    would run is quoted by a leading apostrophe.
    """
    out, metrics = io.StringIO(newline=""), headlines_of(report)
    writer = csv.DictWriter(out, (*COLUMNS, *metrics), lineterminator="\n")
    writer.writeheader()
    for label, row in rows_of(report):
        low, high = row["kl_forward"]["ci95"] or (None, None)
        build = row["build"] or {}
        line = {key: row.get(key) for key in COLUMNS} | {
            "run": label,
            "kl_forward": row["kl_forward"]["mean"],
            "kl_forward_low": low,
            "kl_forward_high": high,
            "kl_forward_p95": row["kl_forward"]["p95"],
            "selection_kl_forward": row["selection"]["kl_forward"]["mean"] if row.get("selection") else None,
            "operators": " > ".join(row["lineage"]["operators"]),
            "students": "; ".join(f"{name} {s['quantity']} {_short(s['mean'])}" for name, s in row["students"].items()),
            **{
                f"build_{key}": build.get(key)
                for key in ("seconds", "tokens_in", "tokens_out", "model_calls", "shared_by")
            },
            **{name: row.get("metrics", {}).get(name, {}).get("mean") for name in metrics},
        }
        writer.writerow({key: _safe(value) for key, value in line.items()})
    return out.getvalue()


def headlines_of(report: dict[str, Any]) -> list[str]:
    """The quantity that stands for each metric of the runs' configs, each once."""
    return list(dict.fromkeys(name for run in report["runs"] for name in run.get("headlines", ())))


def _metric(row: dict[str, Any], name: str) -> str:
    mean = row.get("metrics", {}).get(name, {}).get("mean")
    return "–" if mean is None else f"{mean:.3f}"


def _kept(row: dict[str, Any]) -> str:
    """As on the leaderboard of a run: the share of the template's effect, in percent."""
    share = row.get("share_kept")
    return "–" if share is None else f"{share:.1%}".removesuffix("%")


def _safe(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@\t\r") else value


def to_markdown(report: dict[str, Any]) -> str:
    """What to take and why, and the leaderboard, for a pull request or a wiki."""
    several = len(report["runs"]) > 1
    lines = [f"# {_cell(', '.join(run['label'] for run in report['runs']))}", ""]
    for run in report["runs"]:
        start = f"**{_cell(run['label'])}**: " if several else ""
        lines += [start + _cell(" ".join(run["advice"]["sentences"])), ""]
    for sentence in report.get("changes", {}).get("why", ()):
        lines += [_cell(sentence), ""]
    metrics = headlines_of(report)
    heads = ["forward KL", "kept %", *metrics, "95 % interval", "p95", "gold NLL", "top-1", "build"]
    heads = (["run"] if several else []) + ["context", "kind", "tokens", *heads]
    lines.append("| " + " | ".join(map(_cell, heads)) + " |")
    lines.append("| " + " | ".join("---" if head in ("run", "context", "kind") else "---:" for head in heads) + " |")
    for label, row in rows_of(report):
        kl = row["kl_forward"]
        cells = ([label] if several else []) + [
            row["name"], row["kind"], str(row["tokens"]), number(kl["mean"]) + mark(row), _kept(row),
            *(_metric(row, name) for name in metrics), interval_text(kl["ci95"]),
            f"{kl['p95']:.3f}", f"{row['gold_nll']:.4f}", f"{row['top1_agreement']:.1%}", build_text(row["build"]),
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    lines += ["", "Forward KL in nats per gold token on the validation rows; ~ not separable from the best."]
    for run in report["runs"]:
        floor = run["noise_floor"]
        start = f"{run['label']}: " if several else ""
        lines.append(_cell(f"{start}{_rows(run)}, noise floor {number(floor['kl_forward'])}."))
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Text that cannot leave its cell or become markup."""
    text = " ".join(text.split())
    for character in "\\|`*_[]":
        text = text.replace(character, "\\" + character)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def mark(row: dict[str, Any]) -> str:
    return " ~" if row.get("separable_from_best") is False else ""


def interval_text(interval: Any) -> str:
    shown = shown_interval(interval)
    return f"{number(shown[0])}–{number(shown[1])}" if shown else "–"


def build_text(build: dict[str, Any] | None) -> str:
    """What a context cost: seconds, and among how many the work was shared."""
    if build is None:
        return "–"
    shared = f" for {build['shared_by']}" if build["shared_by"] > 1 else ""
    return f"{duration(build['seconds'])}{shared}"


def duration(seconds: float) -> str:
    """``57 s``, ``4 min 50 s``, ``2 h 5 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _rows(run: dict[str, Any]) -> str:
    count = run["rows"]["validation"]
    return f"{count} validation row" + ("" if count == 1 else "s")


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def terminal_table(report: dict[str, Any], width: int = WIDTH_OF_FILES) -> Table:
    """The leaderboard for a terminal of that many columns: what does not fit is left out, and the caption says so. Of
    several runs, every context once, with its KL in each.
    """
    return _merged_table(report) if len(report["runs"]) > 1 else _board(report, width)


DISPENSABLE = ("p95", "gold NLL", "95 % interval", "top-1", "kind", "build")
"""Columns of a narrow terminal's table, the first to be left out first."""


def _board(report: dict[str, Any], width: int) -> Table:
    (run,) = report["runs"]
    students = list(dict.fromkeys(name for row in run["contexts"] for name in row["students"]))
    metrics = headlines_of(report)
    columns: dict[str, list[str]] = {"context": [], "kind": []}
    for row in run["contexts"]:
        kl = row["kl_forward"]
        cells = {
            "context": row["name"],
            "kind": row["kind"],
            "tokens": str(row["tokens"]),
            "forward KL": number(kl["mean"]) + mark(row),
            "kept %": _kept(row),
            **{name: _metric(row, name) for name in metrics},
            "95 % interval": interval_text(kl["ci95"]),
            "p95": f"{kl['p95']:.3f}",
            "gold NLL": f"{row['gold_nll']:.4f}",
            "top-1": f"{row['top1_agreement']:.1%}",
            "build": build_text(row["build"]),
        }
        if len(students) <= STUDENTS:
            cells |= {name: _short(row["students"].get(name, {}).get("mean")) for name in students}
        for heading, cell in cells.items():
            columns.setdefault(heading, []).append(cell)
    left_out = []
    for heading in (*reversed(students), *DISPENSABLE, *reversed(metrics), "kept %"):
        if heading in columns and _room(columns) > width:
            left_out.append(heading)
            del columns[heading]
    caption = _caption(report) + (escape(f"; too narrow for {', '.join(left_out)}") if left_out else "")
    view = plain_table(escape(f"{run['label']} · {run['base']}"), caption)
    for heading in columns:
        if heading == "context":
            view.add_column(heading, overflow="fold", min_width=8)
        else:
            view.add_column(escape(heading), justify="left" if heading == "kind" else "right", no_wrap=True)
    for line in zip(*columns.values(), strict=True):
        view.add_row(*map(escape, line))
    return view


def _room(columns: dict[str, list[str]]) -> int:
    """Columns of a terminal that a table with one space on both sides of each cell takes; long names are folded."""
    widths = {heading: max(map(cell_len, [heading, *cells])) for heading, cells in columns.items()}
    return sum(widths.values()) - max(0, widths["context"] - FOLDED) + 2 * len(widths)


def _merged_table(report: dict[str, Any]) -> Table:
    view = plain_table(None, _caption(report))
    view.add_column("context", overflow="fold", min_width=8)
    view.add_column("tokens", justify="right", no_wrap=True)
    for run in report["runs"]:
        view.add_column(escape(f"KL in {run['label']}"), justify="right", overflow="fold", min_width=7)
    view.add_column("changed", overflow="fold", min_width=8)
    for context in report["changes"]["contexts"]:
        lengths = dict.fromkeys(str(count) for count in context["tokens"] if count is not None)
        kls = ["–" if kl is None else number(kl) for kl in context["kl_forward"]]
        view.add_row(*map(escape, [context["name"], " / ".join(lengths), *kls, changed_words(report, context)]))
    return view


def changed_words(report: dict[str, Any], context: dict[str, Any]) -> str:
    """Whether a context's KL differs between the runs."""
    if sum(kl is not None for kl in context["kl_forward"]) < 2:
        return "in one run only"
    if report["changes"]["comparable"] is False:
        return "not comparable"
    if len({kl for kl in context["kl_forward"] if kl is not None}) == 1:
        return "the same"
    if context["apart"] is None:
        return "no intervals"
    return "yes" if context["apart"] else "not told apart"


def _caption(report: dict[str, Any]) -> str:
    several = len(report["runs"]) > 1
    floors = []
    for run in report["runs"]:
        words = f"{_rows(run)}, noise floor {number(run['noise_floor']['kl_forward'])}"
        floors.append(f"{run['label']}: {words}" if several else words)
    ties = not several and any(row.get("separable_from_best") is False for _, row in rows_of(report))
    return escape(f"nats per gold token; {'; '.join(floors)}" + ("; ~ not separable from the best" if ties else ""))
