"""``sequence.json``: students trained on one task after the other, and measured on every task after every stage."""

from __future__ import annotations

from pydantic import Field

from kvopt.documents.part import DocumentPart, FormatVersion


class SequenceStage(DocumentPart):
    """What an arm trained on in one stage."""

    task: str = Field(description="the task's name")
    contexts: list[str] = Field(description="the pool of contexts")
    kept: list[str] = Field(description="those that the last scoring of the pool chose")
    gold_nll: dict[str, float] | None = Field(
        None, description="of the pool at that scoring, in nats per gold token; null where the pool was not scored"
    )
    steps: int = Field(description="optimizer steps")
    tokens: int = Field(description="tokens through the student")
    weights_sha256: str = Field(description="hash of the student's weights after the stage")


class TransferMeans(DocumentPart):
    """Averages of R, in its unit; null for a sequence of one task, where nothing can transfer."""

    AP: float = Field(description="average performance: over all tasks after the last stage")
    BWT: float | None = Field(None, description="backward transfer: what later stages did to earlier tasks")
    FWT: float | None = Field(None, description="forward transfer: what earlier stages did to later tasks")


class SequenceArm(DocumentPart):
    """One way to train a student through the sequence."""

    name: str = Field(description="of the arm")
    stages: list[SequenceStage] = Field(description="in the order in which they were trained")
    R: dict[str, list[list[float | None]]] = Field(
        description="by quantity, the mean under the original template, [stage][task]; row 0 is before training"
    )
    transfer: dict[str, TransferMeans | None] = Field(description="by quantity; null where a score is not defined")


class SequenceDocument(DocumentPart):
    """``sequence.json``: students trained on one task after the other, and measured on every task after every stage."""

    format_version: FormatVersion = 1
    name: str = Field(description="of the sequence")
    base: str = Field(description="the base's name")
    tasks: list[str] = Field(description="names in the order in which they are trained")
    headlines: list[str] = Field(description="one quantity for each metric")
    quantities: list[str] = Field(description="all quantities that every task has")
    arms: list[SequenceArm] = Field(description="in the order of the config")
