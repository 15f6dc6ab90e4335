"""What the page's template is given: the report's numbers put in the order and the form in which they are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from markupsafe import Markup

from kvopt.documents.choosing import BUILT_IN
from kvopt.documents.leaderboard_file import LeaderboardRow
from kvopt.report.answers_view import AnswersView, Wording, answers_view, wordings
from kvopt.report.cards import Card, cards
from kvopt.report.choice import is_mutation, rivals, shown_interval
from kvopt.report.frontier_words import KEPT_IN_WORDS, in_words
from kvopt.report.pictures import distance_picture, kept_picture, learning_curve, length_picture, rank_picture
from kvopt.report.pictures.curves import curve_values
from kvopt.report.pictures.drawing import Scale, log_scale
from kvopt.report.pictures.length import Chosen
from kvopt.report.reading import RunFiles
from kvopt.report.students import StudentsView, students_view
from kvopt.report.study_view import StudyView, study_view
from kvopt.report.worddiff import Piece, template_diff

DIFFS = 40  # mutations whose text is shown
FEW = 3  # mutations on the board that are not folded
REJECTED = 3  # rejected candidates of each reason whose text is shown


@dataclass(frozen=True)
class Strip:
    """A KL and its interval on the leaderboard's log scale, in percent from the left."""

    at: float
    low: float
    width: float


BoardRow = tuple[Mapping[str, Any], Strip]
"""A row of the board, and its KL as a picture."""


@dataclass(frozen=True)
class MutationText:
    """A candidate and what it changed against the original, by message."""

    name: str
    facts: Mapping[str, Any]
    fields: Sequence[tuple[str, Sequence[Piece]]]


@dataclass(frozen=True)
class Page:
    """Everything the template shows; ``run`` is None on a page of several runs."""

    title: str
    rows: Sequence[BoardRow] = ()
    folded: Sequence[BoardRow] = ()
    students: Sequence[str] = ()
    length: Markup | None = None
    cards: Sequence[Card] = ()
    frontier: str | None = None
    kept: Markup | None = None
    distance: Markup | None = None
    answers: AnswersView | None = None
    wordings: Sequence[Wording] = ()
    run: Mapping[str, Any] | None = None
    several: Sequence[Mapping[str, Any]] = ()
    changes: Mapping[str, Any] | None = None
    curves: Sequence[tuple[Mapping[str, Any], Markup]] = ()
    ranks: Sequence[tuple[Mapping[str, Any], Markup | None]] = ()
    mutations: Sequence[MutationText] = ()
    more_mutations: int = 0
    rejected: Sequence[tuple[Mapping[str, Any], Sequence[MutationText]]] = ()
    original: Sequence[tuple[str, str]] = ()
    hashes: Sequence[tuple[str, Any]] = ()
    config: str = ""
    evaluated: StudentsView | None = None
    study: StudyView | None = None


def run_view(run: RunFiles, report: Mapping[str, Any]) -> Page:
    """The page of one run."""
    best = min(
        ((r.name, r.selection.kl_forward.mean) for r in run.board.contexts if r.selection and is_mutation(r)),
        key=lambda p: p[1],
        default=None,
    )
    values = curve_values(run.learned)
    kinds = {row.name: row.kind for row in run.board.contexts}
    mutations, more, rejected = _texts(run, report)
    shown, folded = _board_rows(report)
    return Page(
        title=run.board.name,
        rows=shown,
        folded=folded,
        students=_student_names([report]),
        length=_all_lengths(run),
        cards=cards(run.board, run.folder, {row["name"]: row["pays_after_requests"] for row in report["contexts"]}),
        frontier=in_words(run.board, KEPT_IN_WORDS),
        kept=kept_picture(run.board, advised=report["recommended"]),
        distance=distance_picture(run.board, advised=report["recommended"]),
        answers=answers_view(run),
        wordings=wordings(run),
        run=report,
        curves=[
            (facts, learning_curve(one, values, best, id=f"curve-{position}"))
            for position, (one, facts) in enumerate(zip(run.learned, report["curves"], strict=True))
            if one.history
        ],
        ranks=[
            (one, rank_picture(one, kinds, id=f"rank-{one['over']}") if one["n"] > 1 else None)
            for one in report["rank_agreement"]
            if one["n"]
        ],
        mutations=mutations,
        more_mutations=more,
        rejected=rejected,
        original=_original(run),
        hashes=_hashes(run),
        config=yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True, width=100) if run.config else "",
        evaluated=students_view(run.students) if run.students else None,
        study=study_view(run.study) if run.study else None,
    )


def several_view(runs: Sequence[RunFiles], report: Mapping[str, Any]) -> Page:
    """The page of several runs: their contexts on one leaderboard and one picture, and what changed between them."""
    rows = _labelled(runs)
    floor = max(run.board.noise_floor.kl_forward for run in runs)
    same_length = {run.board.template_tokens for run in runs}
    tokens = same_length.pop() if len(same_length) == 1 else None
    comparable = report["changes"]["comparable"] is not False
    return Page(
        title=" · ".join(run.label for run in runs),
        length=length_picture(rows, [], floor, tokens) if rows and comparable else None,
        several=report["runs"],
        changes=report["changes"],
    )


def _labelled(runs: Sequence[RunFiles]) -> list[tuple[str, LeaderboardRow]]:
    """The contexts of several runs with their run's label; once, and without it, where all runs say the same of one."""
    found: dict[tuple[str, int, float], list[tuple[str, LeaderboardRow]]] = {}
    for run in runs:
        for row in rivals(run.board):
            found.setdefault((row.name, row.tokens, row.kl_forward.mean), []).append((run.label, row))
    labelled = []
    for same in found.values():
        all_runs = len(same) == len(runs)
        labelled += [(r.name if all_runs else f"{r.name} · {label}", r) for label, r in same[: 1 if all_runs else None]]
    return labelled


def _all_lengths(run: RunFiles) -> Markup | None:
    """KL by length of everything that was measured, the mutations that were not reported too."""
    others = [Chosen(r.name, r.tokens, r.selection.kl_forward.mean) for r in run.board.other_mutations]
    rows = [(row.name, row) for row in run.board.contexts if row.name != "original"]
    floor = run.board.noise_floor.kl_forward
    return length_picture(rows, others, floor, run.board.template_tokens) if rows else None


def _board_rows(report: Mapping[str, Any]) -> tuple[list[BoardRow], list[BoardRow]]:
    """The board, the recommended context first, original and no context last; and the mutations that are folded: all
    but the closest few, where there are more.
    """
    contexts = report["contexts"]
    measured = [
        row["kl_forward"] for row in contexts if row["name"] != "original"
    ]  # which may be near 0: off the scale
    values = [end for kl in measured for end in (kl["mean"], *(kl["ci95"] or ()))]
    scale = log_scale(values, 0.0, 100.0)

    def place(row: Mapping[str, Any]) -> int:
        return 0 if row["name"] == report["recommended"] else 2 if row["name"] in BUILT_IN else 1

    rows = [(row, _strip(row["kl_forward"], scale)) for row in sorted(contexts, key=place)]
    mutated = [row["name"] for row, _ in rows if row["lineage"].get("id") or row.get("selection")]
    hidden = set(mutated[FEW:]) - {report["recommended"]}
    return [r for r in rows if r[0]["name"] not in hidden], [r for r in rows if r[0]["name"] in hidden]


def _strip(kl: Mapping[str, Any], scale: Scale) -> Strip:
    low, high = shown_interval(kl["ci95"]) or (kl["mean"], kl["mean"])
    return Strip(round(scale(kl["mean"]), 1), round(scale(low), 1), round(scale(high) - scale(low), 1))


def _student_names(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for report in reports for row in report["contexts"] for name in row["students"])
    return sorted(names, key=lambda name: name != "base")


def _texts(
    run: RunFiles, report: Mapping[str, Any]
) -> tuple[list[MutationText], int, list[tuple[Mapping[str, Any], list[MutationText]]]]:
    """Accepted mutations as diffs, how many more there are, and rejected ones by reason."""
    original = run.template
    if original is None:
        return [], 0, []
    by_name = {m.name: m for m in run.mutations if m.accepted}
    shown = []
    for facts in report["mutations"]["accepted"][:DIFFS]:
        mutation = by_name[facts["name"]]
        if mutation.template is None:
            continue
        fields = template_diff(original, mutation.template)
        shown.append(MutationText(facts["name"], facts, fields))
    rejected = []
    for group in report["mutations"]["rejected"]:
        attempts = {example["attempt"]: example for example in group["examples"][:REJECTED]}
        texts = [
            MutationText(f"attempt {m.attempt}", attempts[m.attempt], template_diff(original, m.template))
            for m in run.mutations
            if m.attempt in attempts and m.template is not None
        ]
        rejected.append((group, texts))
    return shown, max(0, len(report["mutations"]["accepted"]) - DIFFS), rejected


def _original(run: RunFiles) -> list[tuple[str, str]]:
    template = run.template
    if template is None:
        return []
    roles = [m.role for m in template.messages] or ["text"]
    return list(zip(roles, template.fields, strict=True))


def _hashes(run: RunFiles) -> list[tuple[str, Any]]:
    """Seed, versions and hashes in the order in which they are asked for."""
    manifest = run.manifest
    facts = [("kvopt", manifest.get("kvopt_version")), ("seed", manifest.get("seed"))]
    facts += [(key, manifest.get(key)) for key in ("device", "dtype", "threads")]
    facts += [(f"base {key}", value) for key, value in run.of_manifest("base").items()]
    facts += [
        (key.removesuffix("_sha256"), manifest.get(key)) for key in ("template_sha256", "data_sha256", "tokens_sha256")
    ]
    facts += [(f"{split} rows", value) for split, value in run.board.rows_sha256.items()]
    facts += [(key, value) for key, value in run.of_manifest("versions").items()]
    return [(key, value) for key, value in facts if value is not None]
