"""``kvopt-student.json`` in the folder of a student: what it was trained on, and from which base."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from kvopt.documents.part import BaseIdentity, ContextKind, DocumentPart, FormatVersion


class TrainingContext(DocumentPart):
    """A context that a student was trained under."""

    name: str = Field(description="of the context")
    kind: ContextKind = "text"
    tokens: int = Field(0, description="its length in tokens or slots")
    weight: int | float = Field(1, description="how often rows meet it, relative to the others")
    sha256: str | None = Field(None, description="hash of its content")


class TrainingPoint(DocumentPart):
    """What a trainer logged after a step."""

    step: int = Field(description="optimizer steps done")
    epoch: float | None = Field(None, description="passes over the rows")
    loss: float | None = Field(None, description="mean since the last point, in nats per gold token")
    grad_norm: float | None = Field(None, description="norm of the gradient before it is clipped")
    learning_rate: float | None = Field(None, description="of this step")


class HeldOutPoint(DocumentPart):
    """One measurement on rows that a student is not trained on, under the original or its first context."""

    step: int = Field(description="optimizer steps done")
    gold_nll: float = Field(description="nats per gold token")


class PoolScoring(DocumentPart):
    """One scoring of the pool of contexts under the student as it was (schedule state-adaptive)."""

    step: int = Field(description="optimizer steps done")
    gold_nll: dict[str, float] = Field(description="by context, in nats per gold token")
    kept: list[str] = Field(description="names of the contexts that the next steps train on")


class MergedStudent(DocumentPart):
    """A student that a soup was made of, or that LiNeS scaled."""

    folder: str = Field(description="name of its folder")
    name: str = Field(description="of the student")
    weights_sha256: str | None = Field(None, description="hash of its weight files")


class MeasuredSoup(DocumentPart):
    """One soup that a greedy choice measured."""

    members: list[int] = Field(description="positions of the students in it, from 0")
    value: float = Field(description="the validation metric")


class StudentMerge(DocumentPart):
    """How a student was made of others without training."""

    by: str = Field(description="lines, soup or greedy soup")
    alpha: float | None = Field(None, description="of LiNeS: factor on the update of the first layer")
    beta: float | None = Field(None, description="of LiNeS: what the factor gains up to the last layer")
    value: float | None = Field(None, description="of a greedy soup: its validation metric")
    tried: list[MeasuredSoup] | None = Field(None, description="of a greedy soup: every soup that was measured")
    of: list[MergedStudent] = Field(description="the students that it was made of")
    rank: int | None = Field(None, description="of LoRA: the rank of the result")
    lost: float | None = Field(None, description="share of the update's Frobenius norm that a cut of the rank lost")


class StudentFacts(DocumentPart):
    """How a student was trained, or made of others."""

    key: str | None = Field(None, description="hash of everything that it depends on")
    template_sha256: str | None = Field(None, description="hash of the original template")
    data_sha256: str | None = Field(None, description="hash of all rows")
    contexts: list[TrainingContext] = Field([], description="what it was trained under")
    rows: int | None = Field(None, description="training rows")
    rows_dropped: int | None = Field(None, description="rows that were left out because they are too long")
    rows_of_own_answers: int | None = Field(None, description="rows whose gold output is the base's own answer")
    seed: int | None = Field(None, description="of initial weights and the order of rows")
    settings: dict[str, Any] | None = Field(None, description="its section of the config, without name and contexts")
    steps: int | None = Field(None, description="optimizer steps")
    epochs: float | None = Field(None, description="passes over the rows")
    tokens: int | None = Field(None, description="tokens through the student, prompts and gold outputs")
    gold_tokens: int | None = Field(None, description="tokens that the loss was computed on")
    stages: list[PoolScoring] = Field([], description="every scoring of the pool (schedule state-adaptive)")
    history: list[TrainingPoint] = Field([], description="the learning curve")
    held_out: list[HeldOutPoint] = Field([], description="gold NLL on selection rows now and then")
    made: StudentMerge | None = Field(None, description="of a student that was merged, not trained")


class _Identified(DocumentPart):
    format_version: FormatVersion = 1
    kvopt_version: str | None = Field(None, description="the version that wrote it")
    name: str | None = Field(None, description="of the student")
    method: str | None = Field(None, description="lora or full")
    weights_sha256: str | None = Field(None, description="hash of the weight files in the folder")
    adapter_sha256: str | None = Field(None, description="of LoRA: hash of adapter_config.json without the base's name")
    base: BaseIdentity | None = Field(None, description="the base that it was trained from")


class StudentRecord(StudentFacts, _Identified):
    """``kvopt-student.json`` in the folder of a student: what it was trained on, and from which base."""
