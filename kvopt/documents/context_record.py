"""``kvopt.json`` in the folder of a learned context: what PEFT's own files have no field for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from kvopt.documents.part import BaseIdentity, DocumentPart, FormatVersion
from kvopt.documents.scores_file import SplitScores

FILE_NAME = r"^[^./\\\x00-\x1f\x7f][^/\\\x00-\x1f\x7f]*$"
"""What the name of a context must match: it becomes the name of a file where the context is exported."""

Count = Annotated[int, Field(ge=0)]


class SlotPositions(DocumentPart):
    """Where a context stands in the prompt. Keys are stored as rotated to these positions."""

    first: Count = Field(0, description="position of the first slot")
    body: Count | None = Field(None, description="position of the first token after the context")


class LearningPoint(DocumentPart):
    """One measurement while a context was learned; KLs are means in nats per gold token."""

    step: int = Field(description="optimizer steps done; 0 is the initial state")
    train_kl: float | None = Field(None, description="on training batches since the last point; null at step 0")
    held_out_kl: float = Field(description="on the selection rows")
    chosen_by: float | None = Field(
        None, description="what score.select chooses by, on the selection rows, lower is better; absent for the KL"
    )


class OriginSource(DocumentPart):
    """A context that another was made of."""

    name: str = Field(description="of the context")
    content_sha256: str | None = Field(None, description="hash of its tensor; null for a context of another tool")


class ContextOrigin(DocumentPart):
    """How a context was made of others."""

    operation: str = Field(description="move, compose or truncate")
    of: list[OriginSource] = Field([], description="the contexts that it was made of")
    offset: int | None = Field(None, description="of move: the new position of the first slot")
    by: str | None = Field(None, description="of truncate: how the slots that stay were chosen")
    chosen_on: str | None = Field(None, description="of truncate: the split that decided the way; null: it was given")


class _Slots(DocumentPart):
    tokens: Count | None = Field(None, description="slots of the context")


class RecordedScores(SplitScores, _Slots):
    """The scores that a context had when it was made of others."""


class ContextFacts(DocumentPart):
    """How a context came to be, and what it was measured at."""

    key: str | None = Field(None, description="hash of everything that it was learned from")
    template_sha256: str | None = Field(None, description="hash of the original template")
    data_sha256: str | None = Field(None, description="hash of all rows")
    reference_key: str | None = Field(None, description="hash of the reference that it was measured against")
    scope: str | None = Field(None, description="what it replaces: leading (text before the first slot) or all")
    template_tokens: Count | None = Field(None, description="tokens of the original template that it stands for")
    replaced_ids: Count | None = Field(
        None, description="ids at the start of a prompt that it stands for; what follows them is fed (null: unknown)"
    )
    objective: str | None = Field(None, description="what was minimized")
    settings: dict[str, Any] | None = Field(None, description="its section of the config")
    best_step: int | None = Field(None, description="the optimizer step whose state was kept")
    history: list[LearningPoint] = Field([], description="the learning curve")
    origin: ContextOrigin | None = Field(None, description="of a context that was made of others")
    scores: dict[str, RecordedScores] | None = Field(None, description="by split, of a context that was made of others")

    @property
    def best_point(self) -> LearningPoint | None:
        """The point of the learning curve with the lowest held-out KL, None without a curve."""
        return min(self.history, key=lambda point: point.held_out_kl, default=None)


class _Identified(DocumentPart):
    format_version: FormatVersion = 1
    kvopt_version: str | None = Field(None, description="the version that wrote it")
    name: str = Field(pattern=FILE_NAME, max_length=200, description="of the context: a plain file name")
    kind: Literal["soft", "kv"] = Field(description="soft, an embedding for each slot; or kv, a key and a value")
    tokens: Count = Field(description="number of slots")
    positions: SlotPositions | None = Field(None, description="null: from 0 on")
    content_sha256: str | None = Field(None, description="hash of the tensor in adapter_model.safetensors")
    base: BaseIdentity | None = Field(None, description="the base that it was made for")

    @property
    def first_position(self) -> int:
        """The position of the first slot."""
        return self.positions.first if self.positions else 0


class ContextRecord(ContextFacts, _Identified):
    """``kvopt.json`` in the folder of a learned context: what PEFT's own files have no field for."""
