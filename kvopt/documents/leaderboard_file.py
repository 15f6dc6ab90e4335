"""``leaderboard.json``: every context of a run on the validation rows, lowest forward KL first."""

from __future__ import annotations

from pydantic import Field

from kvopt.documents.part import ContextKind, DocumentPart, Estimate, StandsOn
from kvopt.documents.scores_file import SplitScores


class StoredMessage(DocumentPart):
    """One chat message of a template."""

    role: str = Field(description="system, user or assistant")
    content: str = Field(description="its text, with {{slots}}")


class StoredTemplate(DocumentPart):
    """The original template: chat messages, or one text."""

    messages: list[StoredMessage] | None = Field(None, description="of a chat template")
    text: str | None = Field(None, description="of a plain template, with {{slots}}")


class RowCounts(DocumentPart):
    """How many rows each part of the data has."""

    train: int = Field(description="rows that contexts are learned on")
    selection: int = Field(description="rows that contexts are chosen by")
    validation: int = Field(description="rows that scores are reported on")


class NoiseFloor(DocumentPart):
    """What forward KL is between two ways of computing the same thing; nothing below it means anything."""

    kl_forward: float = Field(description="of the original to itself through another batching, nats per gold token")
    batch_sizes: list[int] = Field([], description="the two batch sizes that were compared")
    dtype: str = Field(description="of the base, such as float32")


class MutationLineage(DocumentPart):
    """Where a mutation comes from."""

    id: str = Field("", description="12 hex digits of its template's hash; empty for a text that was only shortened")
    family: str = Field("", description="the family of operators that it began with")
    operators: list[str] = Field([], description="what was applied, in order")
    parents: list[str] = Field([], description="ids of the mutations that it comes from, oldest first")
    seed: int | None = Field(None, description="of the attempt that made it")


class NamedContext(DocumentPart):
    """A context: its name, what it is, how long it is."""

    name: str = Field(description="of the context")
    kind: ContextKind
    tokens: int = Field(description="length in tokens of text, or in slots")


class LeaderboardRow(SplitScores, NamedContext):
    """One context, with its scores on the validation rows."""

    selection: SplitScores | None = Field(None, description="a mutation's scores on the rows that it was chosen by")
    lineage: MutationLineage = Field(MutationLineage(), description="of a mutation; absent for others")
    separable_from_best: bool | None = Field(
        None,
        description="whether the interval of its forward KL lies wholly above that of the best context; null without "
        "intervals, absent for the best context and the original",
    )
    metrics: dict[str, Estimate] | None = Field(
        None, description="the config's metrics of the base's answers under this context, by quantity; null without any"
    )
    template: StoredTemplate | None = Field(None, description="the wording of a text context that is no mutation")


class UnreportedMutation(NamedContext):
    """A mutation that was scored on the selection rows alone, because others were closer there."""

    selection: SplitScores = Field(description="its scores on the rows that mutations are chosen by")
    lineage: MutationLineage = MutationLineage()


class LeaderboardDocument(DocumentPart):
    """``leaderboard.json``: every context of a run on the validation rows, lowest forward KL first."""

    name: str = Field(description="of the run")
    base: str = Field(description="the base's name")
    template_tokens: int = Field(description="tokens of the original template that contexts replace")
    rows: RowCounts
    split: str = Field("validation", description="the split of the contexts' scores")
    selected_on: str = Field("selection", description="the split that mutations were chosen by")
    template: StoredTemplate | None = Field(None, description="the original template; absent in old runs")
    headlines: list[str] = Field([], description="one quantity for each metric of the config, where it has metrics")
    answered: int = Field(0, description="validation rows whose answers the metrics are of")
    complete: bool = Field(True, description="false while the run still has contexts to score")
    rows_sha256: dict[str, str] = Field({}, description="hash of each part's rows, which tells runs apart")
    noise_floor: NoiseFloor
    contexts: list[LeaderboardRow] = Field(description="lowest forward KL first")
    other_mutations: list[UnreportedMutation] = Field([], description="mutations without scores on validation rows")
    stands_on: StandsOn | None = Field(None, description="what it was measured on; absent in old files")
    search: str | None = Field(None, description="which search made its mutations, as in mutations.jsonl")
