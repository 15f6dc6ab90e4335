"""The leaderboard: every context of a task, all kinds, the original and "no context" among them, on one table."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from kvopt.contexts.context import Context, TextContext
from kvopt.documents.leaderboard_file import (
    LeaderboardDocument,
    LeaderboardRow,
    MutationLineage,
    NoiseFloor,
    RowCounts,
    StoredTemplate,
    UnreportedMutation,
)
from kvopt.documents.part import ContextKind, Estimate
from kvopt.documents.scores_file import ScoreLine, SplitScores
from kvopt.documents.validated import read_leaderboard, write_document
from kvopt.errors import InputError
from kvopt.measure.score import Score
from kvopt.run.comparing import compare
from kvopt.run.directory import Workspace
from kvopt.run.encoded_task import EncodedTask
from kvopt.storage.files import sha256_json, write_jsonl, write_text

BOARD = "leaderboard.json"
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
    kind: ContextKind
    tokens: int
    score: Score | None
    selection: Score | None = None
    lineage: MutationLineage | None = None
    template: StoredTemplate | None = None
    metrics: Mapping[str, Estimate] | None = None

    @classmethod
    def of(
        cls,
        context: Context,
        score: Score | None,
        selection: Score | None = None,
        metrics: Mapping[str, Estimate] | None = None,
    ) -> Entry:
        """The entry of a context; ``metrics`` are those of the base's answers under it."""
        lineage, template = None, None
        if isinstance(context, TextContext):
            lineage = context.lineage
            if not context.is_mutation and context.name != "original":
                template = StoredTemplate.model_validate(context.template.to_json())
        return cls(context.name, context.kind, context.tokens, score, selection, lineage, template, metrics)

    def row(self) -> LeaderboardRow:
        """As in ``leaderboard.json``, of a context that was scored on the validation rows."""
        if self.score is None:
            raise ValueError(f"{self.name} has no score on the validation rows")
        row = LeaderboardRow(name=self.name, kind=self.kind, tokens=self.tokens, **dict(self.score.document))
        if self.selection is not None:
            row.selection = self.selection.document
        if self.lineage is not None:
            row.lineage = self.lineage
        if self.template is not None:
            row.template = self.template
        if self.metrics is not None:
            row.metrics = dict(self.metrics)
        return row

    def unreported(self) -> UnreportedMutation:
        """As in ``leaderboard.json``, of a mutation that was scored on the selection rows alone."""
        if self.selection is None:
            raise ValueError(f"{self.name} has no score on the selection rows")
        scores = self.selection.document
        mutation = UnreportedMutation(name=self.name, kind=self.kind, tokens=self.tokens, selection=scores)
        if self.lineage is not None:
            mutation.lineage = self.lineage
        return mutation


def ranked_rows(entries: Sequence[Entry]) -> list[LeaderboardRow]:
    """The contexts that have a score, by forward KL, lowest first."""
    return in_order([entry.row() for entry in entries if entry.score is not None])


def in_order(rows: list[LeaderboardRow]) -> list[LeaderboardRow]:
    """Rows as :func:`ranked_rows` returns them."""
    return sorted(rows, key=lambda row: (row.kl_forward.mean, row.name))


def build_leaderboard(
    task: EncodedTask,
    entries: Sequence[Entry],
    unreported: Sequence[Entry],
    noise_floor: NoiseFloor,
    *,
    headlines: Sequence[str] = (),
    answered: int = 0,
) -> LeaderboardDocument:
    """The leaderboard of some contexts of a task; ``headlines`` and ``answered`` are those of the entries' metrics."""
    board = LeaderboardDocument(
        name=task.config.name,
        base=task.base.name,
        template_tokens=len(task.encoded.prefix),
        rows=RowCounts(**{split: len(rows) for split, rows in _parts(task).items()}),
        split="validation",
        selected_on="selection",
        noise_floor=noise_floor,
        contexts=ranked_rows(entries),
        other_mutations=[entry.unreported() for entry in unreported],
    )
    if headlines:
        board.headlines, board.answered = list(headlines), answered
    return board


def write_leaderboard(task: EncodedTask, board: LeaderboardDocument, at: Workspace) -> LeaderboardDocument:
    """Write ``leaderboard.json``, ``leaderboard.csv`` and ``scores.jsonl``; return the first document, which tells runs
    apart by the template's text and a hash of each part's rows.
    """
    compare(board, task, at)
    board.template = StoredTemplate.model_validate(task.template.to_json())
    board.rows_sha256 = rows_sha256(task)
    board.stands_on = task.stands_on
    write_document(at.directory / BOARD, board)
    write_text(at.directory / "leaderboard.csv", _as_csv([*board.contexts, *board.other_mutations], board.headlines))
    rows: list[LeaderboardRow | UnreportedMutation] = [*board.contexts, *board.other_mutations]
    lines = [line.to_json() for row in rows for line in _score_lines(row)]
    write_jsonl(at.directory / "scores.jsonl", lines)
    return board


def rows_sha256(task: EncodedTask) -> dict[str, str]:
    """Hash of each part's rows."""
    return {split: sha256_json([[e.values, e.output] for e in rows]) for split, rows in _parts(task).items()}


def stored_board(task: EncodedTask, at: Workspace) -> LeaderboardDocument | None:
    """The leaderboard of this template and these rows in the run directory; None without one."""
    with suppress(InputError):
        board = read_leaderboard(at.directory / BOARD)
        template = StoredTemplate.model_validate(task.template.to_json())
        same_rows = board.template == template and board.rows_sha256 == rows_sha256(task)
        another = board.stands_on.differs_from(task.stands_on) if board.stands_on else board.base != task.base.name
        if same_rows and not another:
            return board
    return None


def _parts(task: EncodedTask) -> dict[str, Sequence[Any]]:
    return {split: getattr(task.dataset, split) for split in SPLITS}


def _score_lines(row: LeaderboardRow | UnreportedMutation) -> list[ScoreLine]:
    by_split: dict[str, SplitScores] = {"validation": row} if isinstance(row, LeaderboardRow) else {}
    if row.selection is not None:
        by_split["selection"] = row.selection
    return [
        ScoreLine(
            context=row.name,
            kind=row.kind,
            tokens=row.tokens,
            split=split,
            **{name: getattr(scores, name) for name in SplitScores.model_fields if name in scores.model_fields_set},
        )
        for split, scores in by_split.items()
    ]


def _as_csv(rows: Sequence[LeaderboardRow | UnreportedMutation], headlines: Sequence[str]) -> str:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, (*COLUMNS, *headlines), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        facts: dict[str, Any] = {"name": row.name, "kind": row.kind, "tokens": row.tokens}
        if isinstance(row, LeaderboardRow):
            facts |= _columns(row) | {"separable_from_best": row.separable_from_best}
            facts |= {name: value.mean for name, value in (row.metrics or {}).items() if name in headlines}
        if row.selection is not None:
            facts["selection_kl_forward"] = row.selection.kl_forward.mean
        writer.writerow(facts | {"operators": " > ".join(row.lineage.operators)})
    return out.getvalue()


def _columns(scores: SplitScores) -> dict[str, Any]:
    kl = scores.kl_forward
    low, high = kl.ci95 or (None, None)
    columns = {"kl_forward": kl.mean, "kl_forward_low": low, "kl_forward_high": high, "kl_forward_p95": kl.p95}
    return columns | {"gold_nll": scores.gold_nll, "top1_agreement": scores.top1_agreement}
