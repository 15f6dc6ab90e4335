"""``students/NAME/evaluation.json``: how one model answers under every kind of context."""

from __future__ import annotations

from pydantic import Field

from kvopt.documents.part import CI95, ContextKind, DocumentPart, Estimate, FormatVersion, StandsOn
from kvopt.documents.student_record import StudentRecord

BASE = "base"
"""How evaluations call the base, among the names of students."""
WORDINGS = ("original", "held-out", "templates")
"""The groups whose contexts state the task in words: together they are the group "wordings"."""


class _Mean(DocumentPart):
    mean: float | None = Field(description="over the contexts; null where it is not defined for one of them")


class GroupEstimate(_Mean):
    """One quantity over several contexts. Intervals are 95 % bootstraps over examples."""

    min: float | None = Field(None, description="of the context with the lowest value")
    max: float | None = Field(None, description="of the context with the highest value")
    std: float | None = Field(None, description="standard deviation over the contexts")
    spread: float | None = Field(None, description="highest − lowest")
    ci95: CI95 | None = Field(None, description="interval of the mean")
    spread_ci95: CI95 | None = Field(None, description="interval of the spread")
    near_best: float | None = Field(
        None, description="share of the contexts that lie at most 0.05 below the highest; of metrics' headlines only"
    )
    retention: Estimate | None = Field(
        None, description="the mean divided by the value under the original; of metrics' headlines only"
    )


class ConditionResult(DocumentPart):
    """A model under one context."""

    name: str = Field(description="of the context")
    group: str = Field(description="original, held-out, templates, learned, none or other")
    kind: ContextKind = "text"
    tokens: int = Field(0, description="the context's length in tokens or slots")
    answers: str | None = Field(None, description="the file with every answer, relative to the student's folder")
    quantities: dict[str, Estimate] = Field({}, description="what was measured, by name")
    retention: dict[str, Estimate] | None = Field(
        None, description="each headline's value divided by that under the original template; absent in old files"
    )


class GroupResult(DocumentPart):
    """A model under all contexts of one kind; the group wordings has all that state the task in words."""

    group: str = Field(description="original, held-out, templates, wordings, learned, none or other")
    contexts: list[str] = Field([], description="names of the contexts")
    quantities: dict[str, GroupEstimate] = Field({}, description="what was measured, by name")
    consistency: Estimate | None = Field(None, description="share of pairs of contexts that get the same answer")
    posix: Estimate | None = Field(
        None,
        description="POSIX per token: how far the log probability of an answer moves when another wording of the"
        " group asks for it, mean over ordered pairs of wordings, nats per token; absent where it was not asked",
    )


class HabitShares(DocumentPart):
    """Shares of answers, 0 to 1, of a model that was not asked to do the task."""

    same_as_original: Estimate | None = Field(None, description="the same answer as under the original template")
    valid_json: Estimate | None = Field(None, description="JSON objects or lists; null where the task is not JSON")
    looks_like_task: Estimate | None = Field(None, description="one of these two")


class FrozenInstruction(DocumentPart):
    """Means of :class:`HabitShares` under one instruction."""

    instruction: str = Field(description="what the model was asked to do with the task's inputs")
    same_as_original: float | None = Field(None, description="share of the same answers as under the original")
    valid_json: float | None = Field(None, description="share of JSON; null where the task is not JSON")
    looks_like_task: float | None = Field(None, description="share of one of these two")


class _AskedRows(DocumentPart):
    rows: int = Field(0, description="validation rows that were asked")


class FrozenHabits(HabitShares, _AskedRows):
    """Answers under instructions that ask for something else: does the student still do the task?"""

    instructions: list[FrozenInstruction] = Field([], description="the shares under each instruction")


class Forgetting(DocumentPart):
    """How far a model has moved from its base on prompts of other tasks; nats per gold token."""

    rows: int = Field(0, description="probe rows that were measured")
    too_long: int = Field(0, description="probe rows that were left out")
    gold_tokens: int = Field(0, description="gold tokens of the probe rows")
    gold_nll: Estimate | None = Field(None, description="−log probability of the gold tokens")
    kl_from_base: Estimate | None = Field(None, description="KL from the base to the model")
    top1_agreement: Estimate | None = Field(None, description="share of gold tokens with the base's most likely token")
    base_gold_nll: Estimate | None = Field(None, description="the base's −log probability of the gold tokens")
    gold_nll_change: Estimate | None = Field(None, description="gold_nll − base_gold_nll")

    @property
    def quantities(self) -> dict[str, Estimate]:
        """What was measured, by name."""
        return {name: value for name, value in self if isinstance(value, Estimate)}


class EvaluatedRows(DocumentPart):
    """How many validation rows an evaluation used."""

    answered: int = Field(0, description="rows that the model answered")
    scored: int = Field(0, description="rows whose gold likelihood was measured")


class EvaluationDocument(DocumentPart):
    """``students/NAME/evaluation.json``: how one model answers under every kind of context."""

    format_version: FormatVersion = 1
    name: str = Field(description="of the student; base for the base")
    base: str | None = Field(None, description="the base's name")
    dtype: str | None = Field(None, description="of the model, such as float32")
    student: StudentRecord | None = Field(None, description="kvopt-student.json without its history; null for the base")
    rows: EvaluatedRows = EvaluatedRows()
    headlines: list[str] = Field([], description="one quantity for each metric")
    quantities: list[str] = Field([], description="all quantities, those of the metrics first")
    contexts: list[ConditionResult] = Field([], description="each context that the model was given")
    groups: list[GroupResult] = Field([], description="each kind of context")
    no_context: HabitShares | None = Field(None, description="answers to the bare input; null where it was not asked")
    frozen_prompt: FrozenHabits | None = Field(None, description="null where it was not asked")
    forgetting: Forgetting | None = Field(None, description="null without probe prompts")
    stands_on: StandsOn | None = Field(None, description="what it was measured on; absent in old files")

    def group(self, name: str) -> GroupResult | None:
        """The group of that name, None without it."""
        return next((group for group in self.groups if group.group == name), None)

    def headline(self) -> str | None:
        """The quantity that stands for this evaluation on the leaderboard."""
        return next(iter(self.headlines or self.quantities), None)
