"""``leaderboard.json``: every context of a run on the validation rows, lowest forward KL first."""

from __future__ import annotations

from pydantic import Field

from kvopt.documents.part import CI95, ContextKind, DocumentPart, Estimate, StandsOn
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


class Difference(DocumentPart):
    """The forward KL of a context minus that of another one, on the validation rows that both were scored on."""

    to: str = Field(description="the other context's name")
    mean: float = Field(description="nats per gold token; positive where the context is further from the template")
    ci95: CI95 | None = Field(None, description="bootstrap interval over rows; null for a single row")
    p: float | None = Field(
        None,
        description="two-sided, of random signs of the rows' differences, corrected for the number of contexts on the"
        " board (Holm); null for a single row",
    )


class LeaderboardRow(SplitScores, NamedContext):
    """One context, with its scores on the validation rows."""

    selection: SplitScores | None = Field(None, description="scores on the rows that contexts are chosen by")
    lineage: MutationLineage = Field(MutationLineage(), description="of a mutation; absent for others")
    separable_from_best: bool | None = Field(
        None,
        description="whether a paired test on the validation rows tells its forward KL from that of the closest context"
        " (chosen by the selection rows), corrected for the number of contexts (Holm, 5 %); null for a single row,"
        " absent for the closest context and the original",
    )
    difference: Difference | None = Field(
        None, description="to the recommended context; absent for itself, and where that is not known"
    )
    metrics: dict[str, Estimate] | None = Field(
        None, description="the config's metrics of the base's answers under this context, by quantity; null without any"
    )
    template: StoredTemplate | None = Field(None, description="the wording of a text context that is no mutation")


class UnreportedMutation(NamedContext):
    """A mutation that was scored on the selection rows alone, because others were closer there."""

    selection: SplitScores = Field(description="its scores on the rows that mutations are chosen by")
    lineage: MutationLineage = MutationLineage()


class DroppedMutation(NamedContext):
    """A mutation that the race dropped: it was scored on some of the selection rows alone."""

    first_rows: SplitScores = Field(
        description="its scores on the first rows of the race (examples says how many), not on the selection rows"
    )
    lineage: MutationLineage = MutationLineage()


class RaceFacts(DocumentPart):
    """What a race among the mutations (score.race) took."""

    evaluations: int = Field(description="row evaluations, those of the finalists on all selection rows among them")
    without_race: int = Field(description="row evaluations of scoring every mutation on every selection row")
    rows: list[int] = Field([], description="selection rows that mutations were compared on, round by round")
    left: list[int] = Field([], description="mutations that were left after each round")


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
    recommended: str | None = Field(
        None, description="the context to take, chosen by the selection rows; null where there is none to choose from"
    )
    picking: float | None = Field(
        None,
        description="how much lower the lowest forward KL of this table looks than it is, if this table picks it:"
        " a bootstrap estimate, nats per gold token",
    )
    other_mutations: list[UnreportedMutation] = Field([], description="mutations without scores on validation rows")
    race: RaceFacts | None = Field(None, description="of the race among the mutations; absent without one")
    dropped_mutations: list[DroppedMutation] = Field(
        [], description="mutations that the race dropped, the last to be dropped first; absent without a race"
    )
    mutations_in_order: list[str] | None = Field(
        None, description="names of all mutations as score.select orders them, best first; absent where that is the KL"
    )
    stands_on: StandsOn | None = Field(None, description="what it was measured on; absent in old files")
    search: str | None = Field(None, description="which search made its mutations, as in mutations.jsonl")
