"""A run directory as the report reads it: checked documents, with one clear line for what is missing or damaged.

Nothing here needs torch or a model. What a run need not have (learned contexts, mutations, samples, students, a study)
is empty or None.
"""

from __future__ import annotations

import json
from collections.abc import Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kvopt.errors import InputError
from kvopt.mutate.mutation import Mutation, read_mutations
from kvopt.report.evaluation import Evaluation, in_order
from kvopt.report.study import Study
from kvopt.task.template import Template

AGAIN = "delete it and run kvopt run again"


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class KL(_Part):
    """Forward KL: mean, interval and 95th percentile over gold tokens."""

    mean: float
    ci95: tuple[float, float] | None
    p95: float


class Scores(_Part):
    """A context's numbers on one split."""

    kl_forward: KL
    gold_nll: float
    gold_nll_ci95: tuple[float, float] | None = None
    top1_agreement: float
    examples: int
    gold_tokens: int


class Lineage(_Part):
    """Where a mutation comes from: ids of its parents, oldest first."""

    id: str = ""
    family: str = ""
    operators: list[str] = Field(default_factory=list)
    parents: list[str] = Field(default_factory=list)


class Row(Scores):
    """One context on the validation rows."""

    name: str
    kind: Literal["text", "soft", "kv"]
    tokens: int
    selection: Scores | None = None
    lineage: Lineage = Lineage()
    separable_from_best: bool | None = None


class Unreported(_Part):
    """A mutation that was scored on the selection rows only."""

    name: str
    kind: Literal["text", "soft", "kv"]
    tokens: int
    selection: Scores
    lineage: Lineage = Lineage()


class Floor(_Part):
    """The noise floor: KL of the original to itself."""

    kl_forward: float
    dtype: str


class Parts(_Part):
    """How many rows each part of the data has."""

    train: int
    selection: int
    validation: int


class Board(_Part):
    """``leaderboard.json``."""

    name: str
    base: str
    template_tokens: int
    rows: Parts
    noise_floor: Floor
    contexts: list[Row]
    other_mutations: list[Unreported] = Field(default_factory=list)
    template: dict[str, Any] | None = None
    rows_sha256: dict[str, str] = Field(default_factory=dict)


class Token(_Part):
    """A token that a model might say at one place, with its probability."""

    token: str
    p: float


class Reference(_Part):
    """What the base under the original template says of the gold tokens."""

    nll: list[float]
    top: list[Annotated[list[Token], Field(min_length=1)]]


class OnExample(_Part):
    """One context on one example, by gold token."""

    kl: list[float]
    nll: list[float]
    agree: list[bool]
    answer: str | None = None
    top: list[Annotated[list[Token], Field(min_length=1)] | None] | None = None


class SampleExample(_Part):
    """One example of ``samples.json``."""

    id: str
    place: str
    values: dict[str, str]
    output: str
    gold: list[str]
    gold_tokens: int
    reference: Reference
    contexts: dict[str, OnExample]


class ShownContext(_Part):
    """A context of ``samples.json``."""

    name: str
    kind: Literal["text", "soft", "kv"]
    tokens: int


class Samples(_Part):
    """``samples.json``."""

    contexts: list[ShownContext]
    ranked_by: list[str]
    rows: int
    max_new_tokens: int = 0
    examples: list[SampleExample]

    @model_validator(mode="after")
    def _fits_together(self) -> Samples:
        names = {context.name for context in self.contexts}
        if not self.contexts:
            raise ValueError("no contexts")
        for example in self.examples:
            if not names <= set(example.contexts):
                raise ValueError(f"{example.id} lacks {', '.join(sorted(names - set(example.contexts)))}")
            found = [example.contexts[name] for name in names]
            lists: list[Sized] = [example.reference.nll, example.reference.top]
            lists += [values for one in found for values in (one.kl, one.nll, one.agree)]
            lists += [one.top for one in found if one.top is not None]
            if any(len(values) != len(example.gold) for values in lists):
                raise ValueError(f"{example.id} has values for more or fewer tokens than its gold output")
        return self


class LedgerEntry(_Part):
    """One line of ``ledger.jsonl``."""

    stage: str
    outcome: str
    seconds: float
    peak_memory_bytes: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    model_calls: int = 0


class Point(_Part):
    """One step of a learning curve."""

    step: int
    train_kl: float | None = None
    held_out_kl: float | None = None


class Learned(_Part):
    """``contexts/NAME/kvopt.json``, as far as the report needs it."""

    name: str
    kind: Literal["soft", "kv"]
    tokens: int
    settings: dict[str, Any] = Field(default_factory=dict)
    best_step: int | None = None
    history: list[Point] = Field(default_factory=list)


Document = TypeVar("Document", bound=BaseModel)


@dataclass(frozen=True)
class RunFiles:
    """What one run directory holds; ``label`` tells runs apart on one page."""

    folder: Path
    label: str
    board: Board
    manifest: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    ledger: list[LedgerEntry] = field(default_factory=list)
    mutations: list[Mutation] = field(default_factory=list)
    learned: list[Learned] = field(default_factory=list)
    samples: Samples | None = None
    evaluations: list[Evaluation] = field(default_factory=list)
    study: Study | None = None

    @property
    def students(self) -> list[Evaluation]:
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
        source = self.board.template or self.config.get("template")
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
        raise InputError("no such run directory", where=str(folder), mend="kvopt run writes one, runs/NAME by default")
    path = folder / "leaderboard.json"
    if not path.is_file():
        unfinished = any((folder / name).exists() for name in ("manifest.json", ".lock"))
        what = (
            "the run has not come to its end: it has no leaderboard.json" if unfinished else "has no leaderboard.json"
        )
        raise InputError(what, where=str(folder), mend="give a run directory in which kvopt run has finished")
    board = read_board(path)
    config = _yaml(folder / "config.yaml")
    return RunFiles(
        folder,
        label or board.name,
        board,
        manifest=_mapping(folder / "manifest.json"),
        config=config,
        ledger=_ledger(folder / "ledger.jsonl"),
        mutations=read_mutations(folder / "mutations.jsonl"),
        learned=[
            _checked(Learned, _json(file), file, "is not the record of a context")
            for file in (folder / "contexts" / row.name / "kvopt.json" for row in board.contexts if row.kind != "text")
            if file.is_file()
        ],
        samples=_optional(Samples, folder / "samples.json"),
        evaluations=_evaluations(folder, _names(config.get("students"))),
        study=_optional(Study, folder / "study.json", "is not a study; delete it and run kvopt study again"),
    )


def read_board(path: Path) -> Board:
    """A ``leaderboard.json``. Raises InputError for a damaged one."""
    return _checked(Board, _json(path), path, "is not a leaderboard")


def read_runs(folders: list[Path]) -> list[RunFiles]:
    """Several runs, labelled by their names, or by their folders where names are the same."""
    resolved = [folder.resolve() for folder in folders]
    for folder in resolved:
        if resolved.count(folder) > 1:
            raise InputError("is given twice", where=str(folder), mend="give each run directory once")
    runs = [read_run(folder) for folder in folders]
    names = [run.board.name for run in runs]
    labels = names if len(set(names)) == len(names) else [folder.name for folder in resolved]
    if len(set(labels)) < len(labels):
        labels = [str(folder) for folder in folders]
    return [RunFiles(**(vars(run) | {"label": label})) for run, label in zip(runs, labels, strict=True)]


def _names(items: Any) -> list[str]:
    """Names of a config's list of mappings; what is none of these is left out."""
    return [str(item.get("name")) for item in items if isinstance(item, dict)] if isinstance(items, list) else []


def _evaluations(folder: Path, students: Sequence[str]) -> list[Evaluation]:
    files = sorted(folder.glob("students/*/evaluation.json"))
    what = "is not an evaluation; delete it and run kvopt evaluate again"
    return in_order([_checked(Evaluation, _json(file), file, what) for file in files], students)


def _optional(model: type[Document], path: Path, what: str = f"is damaged; {AGAIN}") -> Document | None:
    return _checked(model, _json(path), path, what) if path.is_file() else None


def _checked(model: type[Document], value: Any, path: Path, what: str) -> Document:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        told = [part for part in (place, message) if part and (place or first["type"] == "value_error")]
        reason = f" ({': '.join(told)})" if told else ""
        raise InputError(what + reason, where=str(path)) from None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot be read: {_reason(error)}", where=str(path), mend=AGAIN) from None


def _mapping(path: Path) -> dict[str, Any]:
    """A JSON object, or nothing where there is no file."""
    if not path.is_file():
        return {}
    value = _json(path)
    if not isinstance(value, dict):
        raise InputError("is damaged: not a JSON object", where=str(path), mend=AGAIN)
    return value


def _yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"cannot be read: {_reason(error)}", where=str(path), mend=AGAIN) from None
    if not isinstance(value, dict):
        raise InputError("is damaged: not a mapping", where=str(path), mend=AGAIN)
    return value


def _ledger(path: Path) -> list[LedgerEntry]:
    """Every whole line; a torn last one, which a kill may leave, is left out."""
    if not path.is_file():
        return []
    entries = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            entries.append(LedgerEntry.model_validate(json.loads(line)))
        except ValueError:
            raise InputError("the line is damaged", where=f"{path}:{number}", mend="delete that line") from None
    return entries


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
