"""What each context cost to build, from the ledger: the work since it was last made anew, interrupted attempts
included.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kvopt.documents.leaderboard_file import LeaderboardRow
from kvopt.documents.ledger import LedgerEntry
from kvopt.documents.shortened_file import SHORTENED
from kvopt.report.choice import is_shortened
from kvopt.report.reading import RunFiles

SELECTION_STAGE = re.compile(r"scores/(?P<name>.+)\.(selection|race-\d+-\d+)")
COUNTS = ("seconds", "tokens_in", "tokens_back", "tokens_out", "model_calls")


def build_costs(run: RunFiles) -> dict[str, dict[str, Any]]:
    """By context: seconds, tokens, model calls, peak memory in bytes, and among how many contexts the work was shared.

    A learned context costs its own training. A mutation costs the search that found it and the scoring that chose it,
    which all mutations share; a shortened text the search that cut it, which all of these share. The original and "no
    context" cost nothing and have no entry.
    """
    costs = {}
    for row in run.board.contexts:
        stage = f"contexts/{row.name}"
        if any(entry.stage == stage for entry in run.ledger):
            costs[row.name] = _total(_latest(run.ledger, stage)) | {"shared_by": 1}
    search = [*_latest(run.ledger, "mutations"), *_selection_scores(run)]
    accepted = [m.name for m in run.mutations if m.accepted and m.name]
    for name in accepted if search else []:
        costs[name] = _total(search) | {"shared_by": len(accepted)}
    shortened = [row.name for row in run.board.contexts if is_shortened(row) and row.name not in costs]
    cuts = [entry for entry in run.ledger if entry.stage == SHORTENED]
    for name in shortened if cuts else []:
        costs[name] = _total(cuts) | {"shared_by": len(shortened)}
    return costs


def pays_after(run: RunFiles, row: LeaderboardRow, cost: Mapping[str, Any] | None) -> int | None:
    """Requests after which a shorter context has saved as many tokens of prefill as were spent on it: on the reference,
    and on all of the search that found it. None where it is not shorter, or what it cost is not known.

    A token whose gradient was taken counts twice. Attention, whose work for a token grows with its context, is left
    out: it would let a context pay sooner.
    """
    saved = run.board.template_tokens - row.tokens
    if saved <= 0 or cost is None:
        return None
    spent = cost["tokens_in"] + cost["tokens_back"] + sum(e.tokens_in for e in run.ledger if e.stage == "reference")
    return -(-spent // saved) if spent else None


def stage_costs(ledger: Sequence[LedgerEntry]) -> list[dict[str, Any]]:
    """Every stage in the order in which it first worked, with its totals over the whole ledger."""
    stages = dict.fromkeys(entry.stage for entry in ledger)
    rows = []
    for stage in stages:
        entries = [entry for entry in ledger if entry.stage == stage]
        rows.append({"stage": stage, "times": len(entries), "outcome": entries[-1].outcome, **_total(entries)})
    return rows


def total_costs(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All stages of :func:`stage_costs` together."""
    peak = max((stage["peak_memory_bytes"] for stage in stages), default=0)
    return {key: sum(stage[key] for stage in stages) for key in COUNTS} | {"peak_memory_bytes": peak}


def _selection_scores(run: RunFiles) -> list[LedgerEntry]:
    names = {m.name for m in run.mutations if m.accepted}
    stages = {e.stage for e in run.ledger if (m := SELECTION_STAGE.fullmatch(e.stage)) and m["name"] in names}
    return [entry for stage in sorted(stages) for entry in _latest(run.ledger, stage)]


def _latest(ledger: Sequence[LedgerEntry], stage: str) -> list[LedgerEntry]:
    """The entries of a stage from after its last but one "done" to its last."""
    entries = [entry for entry in ledger if entry.stage == stage]
    done = [i for i, entry in enumerate(entries) if entry.outcome == "done"]
    first = done[-2] + 1 if len(done) > 1 else 0
    return entries[first : done[-1] + 1] if done else entries


def _total(entries: Sequence[LedgerEntry]) -> dict[str, Any]:
    total = {name: sum(getattr(entry, name) for entry in entries) for name in COUNTS}
    peak = max((entry.peak_memory_bytes for entry in entries), default=0)
    return total | {"seconds": round(total["seconds"], 3), "peak_memory_bytes": peak}
