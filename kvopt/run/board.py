"""The leaderboard while it grows: written after every context, so that a run that stops has what it found."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from kvopt.contexts.context import Context, TextContext
from kvopt.documents.answers_file import AnswersDocument
from kvopt.documents.leaderboard_file import DroppedMutation, LeaderboardDocument, LeaderboardRow, NoiseFloor
from kvopt.documents.validated import read_document, write_document
from kvopt.errors import InputError
from kvopt.measure.score import Score
from kvopt.mutate.mutation import search_of
from kvopt.run.answers import ANSWERS, ContextAnswers, TaskMetrics
from kvopt.run.directory import Workspace
from kvopt.run.encoded_task import EncodedTask
from kvopt.run.leaderboard import Entry, build_leaderboard, in_order, stored_board, write_leaderboard
from kvopt.run.race import RaceResult
from kvopt.task.template import Template


@dataclass(frozen=True)
class Measures:
    """What says how good a context is.

    Attributes:
        task: what the contexts are of.
        metrics: of the base's answers under them; empty where the config names none.
        score: a context's score on the validation rows.
        select: a context's score on the selection rows, which contexts are chosen by.
        noise_floor: forward KL of the original against itself.
        at: the run directory.
    """

    task: EncodedTask
    metrics: TaskMetrics
    score: Callable[[Context], Score]
    select: Callable[[Context], Score]
    noise_floor: NoiseFloor
    at: Workspace

    def entry(self, context: Context, selection: Score | None = None) -> Entry:
        """A context's line of the leaderboard."""
        if selection is None and context is not self.task.original and self.task.dataset.selection:
            selection = self.select(context)
        estimates = self.metrics.estimates(self.metrics.answers(context)) if self.metrics else None
        return Entry.of(context, self.score(context), selection, estimates)


class Board:
    """The leaderboard of a run that is going on.

    Args:
        measures: score the contexts.
        shown: called with the leaderboard after each context.
        earlier: rows of a board before this one that are to be added again; until then they are shown as they were, so
            that a process that dies in between does not lose them.

    Attributes:
        unreported: mutations that have scores on the selection rows alone, in the order of ``score.select``.
        raced: the mutations that a race dropped, and what it took; None where it was not run yet.
    """

    def __init__(
        self,
        measures: Measures,
        shown: Callable[[LeaderboardDocument], None] | None = None,
        earlier: Sequence[LeaderboardRow] = (),
    ) -> None:
        self._measures, self._shown, self._earlier = measures, shown, earlier
        self._entries: list[Entry] = []
        self._contexts: list[Context] = []
        self.unreported: Sequence[Entry] = ()
        self.raced: RaceResult | None = None

    def add(self, *contexts: Context, selection: Score | None = None) -> None:
        """Score contexts, one after the other, and write the leaderboard after each."""
        for context in contexts:
            self._entries.append(self._measures.entry(context, selection))
            self._contexts.append(context)
            board = self._document()
            board.complete, added = False, {entry.name for entry in self._entries}
            board.contexts = in_order([*board.contexts, *(row for row in self._earlier if row.name not in added)])
            write_leaderboard(self._measures.task, board, self._measures.at)
            if self._shown is not None:
                self._shown(board)

    def finished(self) -> LeaderboardDocument:
        """Write the leaderboard and the answers of all contexts."""
        measures, metrics = self._measures, self._measures.metrics
        metrics.write([metrics.answers(context) for context in self._contexts] if metrics else [])
        return write_leaderboard(measures.task, self._document(), measures.at)

    def _document(self) -> LeaderboardDocument:
        measures, metrics = self._measures, self._measures.metrics
        answers = [metrics.answers(context) for context in self._contexts[:1]] if metrics else []
        board = build_leaderboard(
            measures.task,
            self._entries,
            self.unreported,
            measures.noise_floor,
            headlines=metrics.headlines(answers[0]) if answers else (),
            answered=metrics.rows if metrics else 0,
        )
        if self.raced is not None and self.raced.facts is not None:
            board.race = self.raced.facts
            board.dropped_mutations = [dropped_mutation(*dropped) for dropped in self.raced.dropped]
        if measures.task.config.score.select != "kl":  # they were added in that order
            mutations = [c.name for c in self._contexts if isinstance(c, TextContext) and c.is_mutation]
            board.mutations_in_order = [*mutations, *(entry.name for entry in self.unreported)]
        board.search = search_of(measures.at.directory / "mutations.jsonl")
        return board


def dropped_mutation(context: TextContext, score: Score) -> DroppedMutation:
    """As in ``leaderboard.json``, of a mutation that a race dropped after it had this score on its first rows."""
    mutation = DroppedMutation(name=context.name, kind=context.kind, tokens=context.tokens, first_rows=score.document)
    if context.lineage is not None:
        mutation.lineage = context.lineage
    return mutation


def earlier_wordings(task: EncodedTask, at: Workspace) -> list[LeaderboardRow]:
    """Rows of the stored leaderboard that are wordings of the user's own."""
    board = stored_board(task, at)
    return [row for row in board.contexts if row.template is not None] if board else []


def carried_wordings(task: EncodedTask, at: Workspace, taken: Collection[str]) -> dict[str, TextContext]:
    """Wordings that ``kvopt score`` put on the stored leaderboard, by name, without the names that are ``taken``."""
    carried = {}
    for row in earlier_wordings(task, at):
        if row.name in taken or row.template is None:
            continue
        try:
            template = Template.from_json(row.template.to_json(), where=f"leaderboard.json {row.name}")
            carried[row.name] = task.text_context(row.name, template, row.lineage if row.lineage.family else None)
        except InputError as error:
            at.say(f"warning: {row.name} is left out: {error}")
    return carried


def put_on_board(measures: Measures, contexts: Sequence[Context]) -> LeaderboardDocument | None:
    """Put wordings that are no mutations, such as ``text:FILE``, on the run's leaderboard, which is made where there is
    none; None without such a wording among ``contexts``. Raises InputError for the name of another context.
    """
    task, metrics, at = measures.task, measures.metrics, measures.at
    own = [c for c in contexts if isinstance(c, TextContext) and not c.is_mutation and c.name != "original"]
    if not own:
        return None
    board = stored_board(task, at)
    if board is None or _holds_wordings_alone(board):
        others = carried_wordings(task, at, taken={context.name for context in own}) if board else {}
        growing = Board(measures, earlier=earlier_wordings(task, at))
        growing.add(task.original, task.none, *others.values(), *own)
        return growing.finished()
    rows = {row.name: row for row in board.contexts}
    for context in own:
        if context.name in rows and rows[context.name].template is None:
            fix = "give the file another name"
            raise InputError("is the name of another context on the leaderboard", where=context.name, fix=fix)
    rows |= {context.name: measures.entry(context).row() for context in own}
    board.contexts = in_order(list(rows.values()))
    if metrics and board.headlines:
        _put_answers(metrics, [metrics.answers(context) for context in own], at)
    return write_leaderboard(task, board, at)


def _holds_wordings_alone(board: LeaderboardDocument) -> bool:
    """Whether a board was begun here by a process that died: all of it is made again, from scores that are there."""
    return not board.complete and all(row.template or row.name in ("original", "none") for row in board.contexts)


def _put_answers(metrics: TaskMetrics, answered: Sequence[ContextAnswers], at: Workspace) -> None:
    stored, new = read_document(AnswersDocument, at.directory / ANSWERS), metrics.document(answered)
    names = {context.name for context in new.contexts}
    stored.contexts = [context for context in stored.contexts if context.name not in names] + new.contexts
    added = {example.id: example.answers for example in new.examples}
    for example in stored.examples:
        example.answers |= added[example.id]
    write_document(at.directory / ANSWERS, stored)
