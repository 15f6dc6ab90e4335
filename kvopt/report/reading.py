"""A run directory as the report reads it: checked documents, with one clear line for what is missing or damaged.

Nothing here needs torch or a model. What a run need not have (learned contexts, mutations, samples, students, a study)
is empty or None.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from kvopt.documents.answers_file import AnswersDocument
from kvopt.documents.context_record import ContextRecord
from kvopt.documents.evaluation_file import BASE, EvaluationDocument
from kvopt.documents.leaderboard_file import LeaderboardDocument
from kvopt.documents.ledger import LedgerEntry, read_ledger
from kvopt.documents.part import DocumentPart, StandsOn
from kvopt.documents.samples_file import SamplesDocument
from kvopt.documents.study_file import StudyDocument
from kvopt.documents.validated import RUN_AGAIN, check_unchanged, json_value, read_document, read_leaderboard, reason_of
from kvopt.errors import InputError
from kvopt.mutate.mutation import Mutation, read_mutations
from kvopt.task.template import Template

RUN, EVALUATE, STUDY = "kvopt run", "kvopt evaluate", "kvopt study"
NO_EVALUATION = "is not an evaluation; delete it and run kvopt evaluate again"
NO_CONTEXT = "is not the record of a context"
NO_STUDY = "is not a study; delete it and run kvopt study again"

Standing = TypeVar("Standing", bound=DocumentPart)


@dataclass(frozen=True)
class LeftOut:
    """A file of a run directory that is not shown, because it stands on something else than the leaderboard."""

    what: str
    why: str
    again: str
    """The command that measures it anew."""

    def __str__(self) -> str:
        return f"{self.what}: {self.why} ({self.again} measures it on what the board stands on)"


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
    left_out: list[LeftOut] = field(default_factory=list)

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
    manifest, config = _mapping(folder / "manifest.json"), _yaml(folder / "config.yaml")
    latest = _stands_on(manifest)
    board_stands = _Basis(board.stands_on or latest)
    if not board_stands.fits(latest, "manifest.json and config.yaml", RUN):
        manifest, config = {}, {}
    mutations = read_mutations(folder / "mutations.jsonl")
    if board.search is not None and any(one.search != board.search for one in mutations):
        board_stands.leave_out("mutations.jsonl", "another search than that of the board's mutations", RUN)
        mutations = []
    learned = [(name, folder / "contexts" / name / "kvopt.json") for name in _of_tensors(board)]
    fitting = board_stands.fitting
    return RunFiles(
        folder,
        label or board.name,
        board,
        manifest=manifest,
        config=config,
        ledger=read_ledger(folder / "ledger.jsonl"),
        mutations=mutations,
        learned=[
            record
            for name, path in learned
            if (record := fitting(_optional(ContextRecord, path, NO_CONTEXT), f"contexts/{name}", RUN))
        ],
        samples=fitting(_optional(SamplesDocument, folder / "samples.json"), "samples.json", RUN),
        answers=fitting(_optional(AnswersDocument, folder / "answers.json"), "answers.json", RUN),
        evaluations=[
            one
            for one in _evaluations(folder, _names(config.get("students")))
            if fitting(one, f"the evaluation of {one.name}", EVALUATE)
        ],
        study=fitting(_optional(StudyDocument, folder / "study.json", NO_STUDY), "study.json", STUDY),
        left_out=board_stands.left_out,
    )


@dataclass(frozen=True)
class _Basis:
    """What a leaderboard stands on, and what does not fit it."""

    stands_on: StandsOn
    left_out: list[LeftOut] = field(default_factory=list)

    def fits(self, other: StandsOn | None, what: str, again: str) -> bool:
        """Whether something stands on the same; what does not is left out."""
        why = other.differs_from(self.stands_on) if other else None
        if why is not None:
            self.leave_out(what, why, again)
        return why is None

    def fitting(self, document: Standing | None, what: str, again: str) -> Standing | None:
        """The document; None for one that does not fit, and for none."""
        return document if document and self.fits(_standing_of(document), what, again) else None

    def leave_out(self, what: str, why: str, again: str) -> None:
        self.left_out.append(LeftOut(what, why, again))


def _of_tensors(board: LeaderboardDocument) -> list[str]:
    """Names of the learned contexts on a board."""
    return [row.name for row in board.contexts if row.kind != "text"]


def _optional(model: type[Standing], path: Path, *what: str) -> Standing | None:
    return read_document(model, path, *what) if path.is_file() else None


def _stands_on(manifest: dict[str, Any]) -> StandsOn:
    """What a run directory stood on when a command last worked in it, as far as its manifest can be read."""
    with suppress(ValidationError):
        return StandsOn.model_validate({name: manifest.get(name) for name in StandsOn.model_fields})
    return StandsOn()


def _standing_of(document: DocumentPart) -> StandsOn | None:
    """What a document says that it stands on; evaluations of old versions say it in the student's own record."""
    if isinstance(document, ContextRecord):
        return StandsOn(base=document.base, template_sha256=document.template_sha256, data_sha256=document.data_sha256)
    stands_on = getattr(document, "stands_on", None)
    if stands_on is None and isinstance(document, EvaluationDocument) and document.student is not None:
        return StandsOn(base=document.student.base)
    return stands_on


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
    check_unchanged(value, path, RUN_AGAIN)
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
    check_unchanged(value, path, RUN_AGAIN)
    return value
