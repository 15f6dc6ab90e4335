"""The leaderboard: every context of a task, all kinds, the original and "no context" among them, on one table."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvopt.contexts.context import Context
from kvopt.measure.score import Score
from kvopt.run.directory import Workspace
from kvopt.run.encoded_task import EncodedTask
from kvopt.storage.files import sha256_json, write_json, write_jsonl, write_text

SPLITS = ("train", "selection", "validation")
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


def make_leaderboard(
    task: EncodedTask,
    entries: Sequence[Entry],
    unreported: Sequence[Entry],
    noise_floor: dict[str, Any],
    at: Workspace,
) -> dict[str, Any]:
    """Write ``leaderboard.json``, ``leaderboard.csv`` and ``scores.jsonl``; return the first document."""
    board = build_leaderboard(entries, unreported, noise_floor, report_facts(task))
    write_json(at.directory / "leaderboard.json", board)
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in [*board["contexts"], *board["other_mutations"]]:
        writer.writerow(_flat(row))
    write_text(at.directory / "leaderboard.csv", out.getvalue())
    write_jsonl(at.directory / "scores.jsonl", _score_rows([*entries, *unreported]))
    return board


def board_facts(task: EncodedTask) -> dict[str, Any]:
    """What a leaderboard says about its run."""
    return {
        "name": task.config.name,
        "base": task.base.name,
        "template_tokens": len(task.encoded.prefix),
        "rows": {split: len(getattr(task.dataset, split)) for split in SPLITS},
        "split": "validation",
        "selected_on": "selection",
    }


def report_facts(task: EncodedTask) -> dict[str, Any]:
    """:func:`board_facts` with the template's text and a hash of each part's rows, which tell runs apart."""
    rows_of = {split: getattr(task.dataset, split) for split in SPLITS}
    hashes = {split: sha256_json([[e.values, e.output] for e in rows]) for split, rows in rows_of.items()}
    return board_facts(task) | {"template": task.template.to_json(), "rows_sha256": hashes}


def _score_rows(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The lines of ``scores.jsonl``."""
    rows = []
    for entry in entries:
        facts = {"context": entry.name, "kind": entry.kind, "tokens": entry.tokens}
        for split, score in (("validation", entry.score), ("selection", entry.selection)):
            if score is not None:
                rows.append({**facts, "split": split, **score.to_json()})
    return rows


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
