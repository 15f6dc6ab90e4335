"""What the base answers under each context, beside its answer under the original: passes, fails, and other words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvopt.documents.answers_file import AnswersDocument
from kvopt.documents.leaderboard_file import LeaderboardDocument, NamedContext
from kvopt.documents.samples_file import SamplesDocument
from kvopt.report.choice import is_mutation, is_shortened, own_prompt, recommended
from kvopt.report.reading import RunFiles
from kvopt.report.worddiff import Piece, diff, template_diff
from kvopt.task.template import Template

ROWS = 20  # rows that are shown
COLUMNS = 8  # contexts that are shown
ROOM = 300_000  # characters of answers on one page


@dataclass(frozen=True)
class MetricVerdict:
    """What one metric says of one answer; ``passed`` is None where the metric is no matter of pass or fail."""

    headline: str
    value: float | None
    passed: bool | None


@dataclass(frozen=True)
class AnswerCell:
    """One answer; ``text`` is None where there was no room for one. ``pieces`` lead to it from the original's."""

    text: str | None
    cut: bool = False
    verdicts: Sequence[MetricVerdict] = ()
    pieces: Sequence[Piece] = ()
    other_words: int = 0


@dataclass(frozen=True)
class AnswerRow:
    """One example: the values of its slots, the gold output, and an answer for each context that is shown."""

    id: str
    values: Mapping[str, str]
    output: str
    cells: Sequence[AnswerCell]

    @property
    def gist(self) -> str:
        """The first slot's value, cut."""
        words = " ".join(next(iter(self.values.values()), "").split())
        return words if len(words) <= 60 else words[:57] + "…"


@dataclass(frozen=True)
class AnswersView:
    """The table of answers. ``contexts`` are the columns, the original first; ``rows_in_all`` counts those in the file
    too, ``contexts_in_all`` likewise; ``file`` is where the answers stand.
    """

    file: str
    max_new_tokens: int
    headlines: Sequence[str]
    contexts: Sequence[NamedContext]
    contexts_in_all: int
    rows: Sequence[AnswerRow]
    rows_in_all: int


@dataclass(frozen=True)
class Wording:
    """The text of a text context on the board, by message: whole for the original, else as changes to the original."""

    name: str
    what: str
    fields: Sequence[tuple[str, Sequence[Piece]]] = field(default_factory=tuple)


def answers_view(run: RunFiles) -> AnswersView | None:
    """The answers of ``answers.json``, or those of ``samples.json`` where a run has no metrics; None without both."""
    if run.answers is not None and run.answers.examples:
        return _of_answers(run.answers, run.board)
    if run.samples is not None and run.samples.examples:
        return _of_samples(run.samples, run.board)
    return None


def wordings(run: RunFiles) -> list[Wording]:
    """Every wording on the board whose text is known; the original first, then as on the board."""
    original = run.template
    if original is None:
        return []
    found = [Wording("original", "the template", [(role, [Piece("same", text)]) for role, text in _fields(original)])]
    mutated = {m.name: m.template for m in run.mutations if m.accepted and m.template is not None}
    for row in run.board.contexts:
        if row.kind != "text" or row.name in ("original", "none"):
            continue
        own = Template.from_json(row.template.model_dump()) if row.template is not None else None
        text = mutated.get(row.name) if is_mutation(row) else own
        if text is not None:
            kinds = ((is_shortened, "shortened from the template"), (is_mutation, "mutation"))
            what = next((name for fits, name in kinds if fits(row)), "your own prompt")
            found.append(Wording(row.name, what, template_diff(original, text)))
    return found


def _fields(template: Template) -> list[tuple[str, str]]:
    roles = [message.role for message in template.messages] or ["text"]
    return list(zip(roles, template.fields, strict=True))


def _of_answers(document: AnswersDocument, board: LeaderboardDocument) -> AnswersView:
    contexts = _columns(document.contexts, board)
    rows = []
    for example in document.examples:
        answers = [example.answers[context.name] for context in contexts]
        first = example.answers[document.contexts[0].name].text
        cells = [
            _cell(first, one.text, one.cut, _verdicts(document, one.metrics), original=position == 0)
            for position, one in enumerate(answers)
        ]
        rows.append(AnswerRow(example.id, example.values, example.output, cells))
    shown = _telling(rows)
    return AnswersView(
        "answers.json", document.max_new_tokens, document.headlines, contexts, len(document.contexts), shown, len(rows)
    )


def _of_samples(document: SamplesDocument, board: LeaderboardDocument) -> AnswersView:
    contexts = _columns(document.contexts, board)
    rows = []
    for example in document.examples:
        first = example.contexts[document.contexts[0].name].answer
        answers = [example.contexts[context.name].answer for context in contexts]
        cells = [_cell(first, text, False, (), original=position == 0) for position, text in enumerate(answers)]
        rows.append(AnswerRow(f"{example.id}, {example.place}", example.values, example.output, cells))
    return AnswersView("samples.json", document.max_new_tokens, (), contexts, len(document.contexts), rows, len(rows))


def _columns(contexts: Sequence[NamedContext], board: LeaderboardDocument) -> list[NamedContext]:
    """The original, what is recommended, the user's own prompt, then as on the board; "no context" is always there."""
    original, *others = contexts
    own, best = own_prompt(board), recommended(board)
    place = {row.name: position for position, row in enumerate(board.contexts)}
    first = [name for name in (best, own.name if own else None) if name]

    def order(context: NamedContext) -> tuple[bool, int, int]:
        ahead = first.index(context.name) if context.name in first else len(first)
        return context.name == "none", ahead, place.get(context.name, len(place))

    ordered = sorted(others, key=order)
    last = [context for context in ordered if context.name == "none"]
    return [original, *ordered[: len(ordered) - len(last)][: COLUMNS - 1 - len(last)], *last]


def _verdicts(document: AnswersDocument, values: Mapping[str, float | None]) -> list[MetricVerdict]:
    found = []
    for headline in document.headlines:
        value = values.get(headline)
        passed = value >= 1 if value is not None and headline in document.pass_or_fail else None
        found.append(MetricVerdict(headline, value, passed))
    return found


def _cell(
    original_text: str | None, text: str | None, cut: bool, verdicts: Sequence[MetricVerdict], *, original: bool
) -> AnswerCell:
    if text is None or original or original_text is None:
        return AnswerCell(text, cut, verdicts, [Piece("same", text)] if text is not None else ())
    pieces = diff(original_text, text)
    return AnswerCell(text, cut, verdicts, pieces, _other_words(pieces))


def _other_words(pieces: Sequence[Piece]) -> int:
    """How many words are gone or new, whichever is more."""
    count = {kind: sum(len(p.text.split()) for p in pieces if p.kind == kind) for kind in ("gone", "new")}
    changed = any(p.kind in count and p.text for p in pieces)
    return max(*count.values(), int(changed))


def _telling(rows: Sequence[AnswerRow]) -> list[AnswerRow]:
    """The rows that tell contexts apart first: those with most fails, then with most answers unlike the original's."""

    def told(row: AnswerRow) -> tuple[int, int]:
        fails = sum(verdict.passed is False for cell in row.cells for verdict in cell.verdicts)
        return -fails, -sum(cell.other_words > 0 for cell in row.cells)

    shown: list[AnswerRow] = []
    room = ROOM
    for row in sorted(rows, key=told)[:ROWS]:
        room -= sum(len(cell.text or "") for cell in row.cells) + sum(map(len, row.values.values()))
        if shown and room < 0:
            break
        shown.append(row)
    return shown
