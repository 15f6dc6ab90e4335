"""The leaderboard: every context of a task, all kinds, the original and "no context" among them, on one table."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from kvopt.files import write_json, write_text
from kvopt.report.terminal import plain_table

if TYPE_CHECKING:  # a leaderboard is read, shown and compared without torch
    from kvopt.contexts import Context
    from kvopt.score import Score

COLUMNS = (
    "name",
    "kind",
    "tokens",
    "kl_forward",
    "kl_forward_low",
    "kl_forward_high",
    "kl_forward_p95",
    "gold_nll",
    "top1_agreement",
    "selection_kl_forward",
    "separable_from_best",
    "operators",
)


@dataclass(frozen=True)
class Entry:
    """One context: ``score`` on the validation rows (None for mutations that were not selected), ``selection`` on the
    rows it was chosen on.
    """

    name: str
    kind: str
    tokens: int
    score: Score | None
    selection: Score | None = None
    lineage: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, context: Context, score: Score | None, selection: Score | None = None) -> Entry:
        """The entry of a context."""
        lineage = getattr(context, "lineage", {})
        return cls(context.name, context.kind, context.tokens, score, selection, lineage)

    def to_json(self) -> dict[str, Any]:
        """As in ``leaderboard.json`` and ``kvopt score --json``."""
        row: dict[str, Any] = {"name": self.name, "kind": self.kind, "tokens": self.tokens}
        if self.score is not None:
            row |= self.score.to_json()
        if self.selection is not None:
            row["selection"] = self.selection.to_json()
        return row | ({"lineage": self.lineage} if self.lineage else {})


def build_leaderboard(
    entries: Sequence[Entry], unreported: Sequence[Entry], noise_floor: dict[str, Any], facts: dict[str, Any]
) -> dict[str, Any]:
    """The document of ``leaderboard.json``: contexts by forward KL, lowest first.

    ``separable_from_best`` says whether a context's interval lies wholly above that of the best one (the original is
    not compared with); None where there are no intervals, because a single row gives none.
    """
    reported = sorted((e for e in entries if e.score is not None), key=lambda e: (e.score.kl_forward.mean, e.name))  # type: ignore[union-attr]
    rivals = [e for e in reported if e.name != "original"]
    best = rivals[0].score.kl_forward.ci95 if rivals and rivals[0].score else None
    rows = []
    for entry in reported:
        row = entry.to_json()
        mine = entry.score.kl_forward.ci95 if entry.score else None
        if entry.name != "original" and entry is not rivals[0]:
            row["separable_from_best"] = mine[0] > best[1] if best and mine else None
        rows.append(row)
    return {
        **facts,
        "noise_floor": noise_floor,
        "contexts": rows,
        "other_mutations": [entry.to_json() for entry in unreported],
    }


def write_leaderboard(
    folder: Path,
    entries: Sequence[Entry],
    unreported: Sequence[Entry],
    noise_floor: dict[str, Any],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Write ``leaderboard.json`` and ``leaderboard.csv``; return the document."""
    board = build_leaderboard(entries, unreported, noise_floor, facts)
    write_json(folder / "leaderboard.json", board)
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in [*board["contexts"], *board["other_mutations"]]:
        writer.writerow(_flat(row))
    write_text(folder / "leaderboard.csv", out.getvalue())
    return board


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    flat = {
        name: row.get(name) for name in ("name", "kind", "tokens", "gold_nll", "top1_agreement", "separable_from_best")
    }
    if kl := row.get("kl_forward"):
        low, high = kl["ci95"] or (None, None)
        flat |= {"kl_forward": kl["mean"], "kl_forward_low": low, "kl_forward_high": high, "kl_forward_p95": kl["p95"]}
    if selection := row.get("selection"):
        flat["selection_kl_forward"] = selection["kl_forward"]["mean"]
    flat["operators"] = " > ".join(row.get("lineage", {}).get("operators", []))
    return flat


def table(board: dict[str, Any]) -> Table:
    """The leaderboard for a terminal."""
    floor = board["noise_floor"]
    caption = (
        f"{board['rows']['validation']} validation rows; nats per gold token;"
        f" noise floor {floor['kl_forward']:.1e} ({floor['dtype']})"
    )
    if any(row.get("separable_from_best") is False for row in board["contexts"]):
        caption += "; ~ not separable from the best"
    view = plain_table(escape(f"{board['name']} · {board['base']}"), caption)
    view.add_column("context", overflow="fold", min_width=8)
    view.add_column("kind", no_wrap=True)
    for heading in ("tokens", "forward KL", "95 % interval", "p95", "gold NLL", "top-1"):
        view.add_column(heading, justify="right", no_wrap=True)
    for row in board["contexts"]:
        kl = row["kl_forward"]
        interval = f"{kl['ci95'][0]:.4f}–{kl['ci95'][1]:.4f}" if kl["ci95"] else "–"
        mark = " ~" if row.get("separable_from_best") is False else ""
        view.add_row(
            escape(row["name"]), row["kind"], str(row["tokens"]), f"{kl['mean']:.4f}{mark}", interval,
            f"{kl['p95']:.3f}", f"{row['gold_nll']:.4f}", f"{row['top1_agreement']:.1%}",
        )  # fmt: skip
    return view
