"""A run directory as the report reads it: checked documents, with one clear line for what is missing or damaged.

Nothing here needs torch or a model. What a run need not have (learned contexts, mutations, samples, students, a study)
is empty or None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kvopt.documents.answers_file import AnswersDocument
from kvopt.documents.context_record import ContextRecord
from kvopt.documents.evaluation_file import BASE, EvaluationDocument
from kvopt.documents.leaderboard_file import LeaderboardDocument
from kvopt.documents.ledger import LedgerEntry, read_ledger
from kvopt.documents.samples_file import SamplesDocument
from kvopt.documents.study_file import StudyDocument
from kvopt.documents.validated import RUN_AGAIN, json_value, read_document, read_leaderboard, reason_of
from kvopt.errors import InputError
from kvopt.mutate.mutation import Mutation, read_mutations
from kvopt.task.template import Template

NO_EVALUATION = "is not an evaluation; delete it and run kvopt evaluate again"
NO_STUDY = "is not a study; delete it and run kvopt study again"


@dataclass(frozen=True)
class RunFiles:
    """What one run directory holds; ``label`` tells runs apart on one page. ``manifest`` and ``config`` are shown and
    compared, whatever they hold.
    """

    folder: Path
    label: str
    board: LeaderboardDocument
    manifest: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    ledger: list[LedgerEntry] = field(default_factory=list)
    mutations: list[Mutation] = field(default_factory=list)
    learned: list[ContextRecord] = field(default_factory=list)
    samples: SamplesDocument | None = None
    answers: AnswersDocument | None = None
    evaluations: list[EvaluationDocument] = field(default_factory=list)
    study: StudyDocument | None = None

    @property
    def students(self) -> list[EvaluationDocument]:
        """Evaluations of the base and of students of the config; those that a study trained stand in the study."""
        studied = {run.student for arm in (self.study.arms if self.study else ()) for run in arm.runs}
        return [one for one in self.evaluations if one.name not in studied]

    def of_manifest(self, key: str) -> dict[str, Any]:
        """A mapping in the manifest; empty where there is none."""
        value = self.manifest.get(key)
        return value if isinstance(value, dict) else {}

    @property
    def template(self) -> Template | None:
        """The original template; None when neither leaderboard nor config holds its text."""
        stored = self.board.template
        source = stored.to_json() if stored else self.config.get("template")
        if not isinstance(source, dict):
            return None
        try:
            return Template.from_json({key: source.get(key) for key in ("messages", "text")})
        except InputError:
            return None


def read_run(folder: Path, label: str | None = None) -> RunFiles:
    """Everything the report needs of a run directory.

    Raises:
        InputError: not a run directory, the run has not come to its end, or a file in it is damaged.
    """
    if not folder.is_dir():
        raise InputError("no such run directory", where=str(folder), fix="kvopt run writes one, runs/NAME by default")
    path = folder / "leaderboard.json"
    if not path.is_file():
        unfinished = any((folder / name).exists() for name in ("manifest.json", ".lock"))
        what = (
            "the run has not come to its end: it has no leaderboard.json" if unfinished else "has no leaderboard.json"
        )
        raise InputError(what, where=str(folder), fix="give a run directory in which kvopt run has finished")
    board = read_leaderboard(path)
    config = _yaml(folder / "config.yaml")
    samples, answers, study = (folder / f"{name}.json" for name in ("samples", "answers", "study"))
    return RunFiles(
        folder,
        label or board.name,
        board,
        manifest=_mapping(folder / "manifest.json"),
        config=config,
        ledger=read_ledger(folder / "ledger.jsonl"),
        mutations=read_mutations(folder / "mutations.jsonl"),
        learned=[
            read_document(ContextRecord, file, "is not the record of a context")
            for file in (folder / "contexts" / row.name / "kvopt.json" for row in board.contexts if row.kind != "text")
            if file.is_file()
        ],
        samples=read_document(SamplesDocument, samples) if samples.is_file() else None,
        answers=read_document(AnswersDocument, answers) if answers.is_file() else None,
        evaluations=_evaluations(folder, _names(config.get("students"))),
        study=read_document(StudyDocument, study, NO_STUDY) if study.is_file() else None,
    )


def read_runs(folders: list[Path]) -> list[RunFiles]:
    """Several runs, labelled by their names, or by their folders where names are the same."""
    resolved = [folder.resolve() for folder in folders]
    for folder in resolved:
        if resolved.count(folder) > 1:
            raise InputError("is given twice", where=str(folder), fix="give each run directory once")
    runs = [read_run(folder) for folder in folders]
    names = [run.board.name for run in runs]
    labels = names if len(set(names)) == len(names) else [folder.name for folder in resolved]
    if len(set(labels)) < len(labels):
        labels = [str(folder) for folder in folders]
    return [RunFiles(**(vars(run) | {"label": label})) for run, label in zip(runs, labels, strict=True)]


def _names(items: Any) -> list[str]:
    """Names of a config's list of mappings; what is none of these is left out."""
    return [str(item.get("name")) for item in items if isinstance(item, dict)] if isinstance(items, list) else []


def _evaluations(folder: Path, students: Sequence[str]) -> list[EvaluationDocument]:
    files = sorted(folder.glob("students/*/evaluation.json"))
    return in_order([read_document(EvaluationDocument, file, NO_EVALUATION) for file in files], students)


def in_order(evaluations: Sequence[EvaluationDocument], students: Sequence[str]) -> list[EvaluationDocument]:
    """The base first, then the students in the config's order, then others by name."""
    places = {name: position for position, name in enumerate([BASE, *students])}
    return sorted(evaluations, key=lambda one: (places.get(one.name, len(places)), one.name))


def _mapping(path: Path) -> dict[str, Any]:
    """A JSON object, or nothing where there is no file."""
    if not path.is_file():
        return {}
    value = json_value(path)
    if not isinstance(value, dict):
        raise InputError("is damaged: not a JSON object", where=str(path), fix=RUN_AGAIN)
    return value


def _yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"cannot be read: {reason_of(error)}", where=str(path), fix=RUN_AGAIN) from None
    if not isinstance(value, dict):
        raise InputError("is damaged: not a mapping", where=str(path), fix=RUN_AGAIN)
    return value
