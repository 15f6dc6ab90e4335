"""The report as one JSON document: every number that the page shows, for one run or several."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from kvopt.documents.context_record import ContextRecord
from kvopt.documents.evaluation_file import EvaluationDocument
from kvopt.documents.leaderboard_file import DroppedMutation, LeaderboardRow, UnreportedMutation
from kvopt.mutate.mutation import Mutation, counts_by_reason
from kvopt.report.agreement import headline_agreements, rank_agreements
from kvopt.report.changes import compare_runs
from kvopt.report.choice import (
    advice,
    is_mutation,
    on_selection,
    own_prompt,
    pareto_front,
    recommended,
    rivals,
    share_kept,
)
from kvopt.report.costs import build_costs, pays_after, stage_costs, total_costs
from kvopt.report.reading import RunFiles
from kvopt.version import VERSION

FORMAT_VERSION = 1
REJECTED_SHOWN = 4  # rejected candidates of each reason


def document(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """``report.json``: ``runs``, and ``changes`` where there are several."""
    parts: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "kvopt_version": VERSION,
        "runs": [run_document(run) for run in runs],
    }
    return parts | ({"changes": compare_runs(runs)} if len(runs) > 1 else {})


def run_document(run: RunFiles) -> dict[str, Any]:
    """Everything about one run."""
    board, stages = run.board, stage_costs(run.ledger)
    return {
        "label": run.label,
        "name": board.name,
        "base": board.base,
        "template_tokens": board.template_tokens,
        "rows": board.rows.to_json(),
        "noise_floor": board.noise_floor.to_json(),
        "complete": board.complete,
        "left_out": [str(one) for one in run.left_out],
        "advice": advice(board),
        "recommended": recommended(board),
        "picking": board.picking,
        "own_prompt": own.name if (own := own_prompt(board)) else None,
        "headlines": board.headlines,
        "answered": board.answered,
        "contexts": _contexts(run),
        "other_mutations": [_known(row) for row in board.other_mutations],
        "race": board.race.to_json() if board.race else None,
        "dropped_mutations": [_known(row) for row in board.dropped_mutations],
        "chosen": _chosen(run),
        "curves": [_curve(record) for record in run.learned],
        "mutations": _mutations(run),
        "rank_agreement": rank_agreements(board),
        "headline_agreement": headline_agreements(board),
        "samples": run.samples.model_dump(mode="json") if run.samples else None,
        "evaluations": [_evaluation(one) for one in run.evaluations],
        "study": run.study.model_dump(mode="json") if run.study else None,
        "manifest": run.manifest,
        "config": run.config,
        "stages": stages,
        "totals": total_costs(stages),
    }


def _contexts(run: RunFiles) -> list[dict[str, Any]]:
    costs = build_costs(run)
    front = {row.name for row in pareto_front(rivals(run.board))}
    rows = []
    for row in run.board.contexts:
        facts = _known(row) | {
            "pareto": row.name in front,
            "share_kept": share_kept(row, run.board),
            "build": costs.get(row.name),
            "tokens_saved": run.board.template_tokens - row.tokens,
            "pays_after_requests": pays_after(run, row, costs.get(row.name)),
            "students": _of_students(run, row.name),
        }
        rows.append(facts)
    return rows


def _known(row: LeaderboardRow | UnreportedMutation | DroppedMutation) -> dict[str, Any]:
    """What a row of the leaderboard says, its intervals too where a file leaves them out (null); its lineage is there,
    if only an empty one.
    """
    facts = {key: value for key, value in row.model_dump(mode="json").items() if value is not None}
    return facts | {"lineage": row.lineage.model_dump(exclude_none=True)}


def _evaluation(one: EvaluationDocument) -> dict[str, Any]:
    """What was measured, and the student's own record."""
    facts = one.model_dump(mode="json", exclude_none=True, exclude_unset=True)
    return facts | ({"student": one.student.to_json()} if one.student else {})


def _curve(record: ContextRecord) -> dict[str, Any]:
    """The record of a learned context with what the page shows of it, known or not."""
    known = {"settings": record.settings or {}, "best_step": record.best_step}
    return record.to_json() | known | {"history": [point.model_dump() for point in record.history]}


def _of_students(run: RunFiles, context: str) -> dict[str, dict[str, Any]]:
    """By student (and the base): its first headline under this context, where it was evaluated there."""
    values = {}
    for evaluation in run.students:
        headline = evaluation.headline()
        for condition in evaluation.contexts:
            value = condition.quantities.get(headline or "")
            if condition.name == context and value is not None:
                values[evaluation.name] = {"quantity": headline, "mean": value.mean, "ci95": value.ci95}
    return values


def _chosen(run: RunFiles) -> list[dict[str, Any]]:
    """Selection honesty: the KL that a context was chosen by beside the one that is reported."""
    rows = []
    kept = {one.name: _kept_kl(one.best_step, one.history) for one in run.learned}
    for row in rivals(run.board):
        if row.selection is not None and row.name not in kept:
            how = "mutation" if is_mutation(row) else "context"
            mean, interval = row.selection.kl_forward.mean, row.selection.kl_forward.ci95
        elif (checkpoint_kl := kept.get(row.name)) is not None:
            how, mean, interval = "checkpoint", checkpoint_kl, None
        else:
            continue
        rows.append(
            {
                "name": row.name,
                "chosen_as": how,
                "selection_kl": mean,
                "selection_ci95": interval,
                "validation_kl": row.kl_forward.mean,
                "validation_ci95": row.kl_forward.ci95,
                "separable_from_best": row.separable_from_best,
            }
        )
    return rows


def _kept_kl(step: int | None, history: Sequence[Any]) -> float | None:
    return next((point.held_out_kl for point in history if point.step == step), None)


def _mutations(run: RunFiles) -> dict[str, Any]:
    """Accepted mutations by selection KL with their lineage by name, and rejected ones by reason."""
    names = {m.id: m.name for m in run.mutations if m.accepted}
    selected = {name: scores.kl_forward.mean for name, scores in on_selection(run.board)}
    reported = {row.name: row.kl_forward.mean for row in run.board.contexts}
    dropped = {row.name: row.first_rows.examples for row in run.board.dropped_mutations}
    accepted = [
        {
            "name": m.name,
            "id": m.id,
            "family": m.family,
            "operators": list(m.operators),
            "parents": [names.get(parent) or parent for parent in m.lineage],
            "detail": m.detail,
            "seed": m.seed,
            "selection_kl": selected.get(m.name or ""),
            "validation_kl": reported.get(m.name or ""),
            "dropped_after": dropped.get(m.name or ""),
        }
        for m in run.mutations
        if m.accepted
    ]
    accepted.sort(key=lambda m: (m["selection_kl"] is None, m["selection_kl"] or 0.0, m["name"] or ""))
    counts = counts_by_reason(run.mutations) if run.mutations else {}
    reasons = [reason for reason in counts if reason != "accepted"]
    families = Counter(m.family for m in run.mutations)
    return {
        "tried": len(run.mutations),
        "counts": counts,
        "tried_by_family": dict(sorted(families.items())),
        "accepted": accepted,
        "rejected": [_rejected(reason, run.mutations) for reason in reasons],
    }


def _rejected(reason: str, mutations: Sequence[Mutation]) -> dict[str, Any]:
    rejected = [m for m in mutations if not m.accepted and (m.reason or "unknown") == reason]
    return {
        "reason": reason,
        "count": len(rejected),
        "examples": [
            {"attempt": m.attempt, "family": m.family, "operators": list(m.operators), "detail": m.detail}
            for m in rejected[:REJECTED_SHOWN]
        ],
    }
