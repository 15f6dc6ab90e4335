"""What the base answers under the contexts of a run, and what the config's metrics say of it: KL beside what counts.

``answers/CONTEXT.SPLIT.jsonl`` holds the greedy answers under one context, with the key of all that they depend on;
``answers.json`` puts those of the validation rows side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from kvopt.base.generate import answer_text, generate
from kvopt.base.prefix import Prefix
from kvopt.config.metrics import Item, Metric, Ratio
from kvopt.console.progress import advance
from kvopt.contexts.context import Context
from kvopt.documents.answers_file import AnsweredExample, AnswersDocument, ContextAnswer
from kvopt.documents.leaderboard_file import NamedContext
from kvopt.documents.part import Estimate
from kvopt.documents.validated import write_document
from kvopt.measure.ratios import summarize
from kvopt.run.directory import Workspace
from kvopt.run.encoded_task import EncodedTask
from kvopt.storage.files import file_name, key_of
from kvopt.storage.keyed_rows import write_rows
from kvopt.task.examples import Example
from kvopt.task.seam import Row

ANSWERS = "answers.json"
ANSWERS_VERSION = 1
"""Raise it when the same inputs give other answers."""


@dataclass(frozen=True)
class ContextAnswers:
    """The answers under one context to the first rows of a split, in their order.

    Attributes:
        texts: the answers.
        cut: whether each reached the token limit.
        ratios: what the metrics say of each answer, by quantity.
    """

    context: Context
    texts: Sequence[str]
    cut: Sequence[bool]
    ratios: Sequence[Mapping[str, Ratio]]


@dataclass(frozen=True)
class TaskMetrics:
    """The config's metrics, and the answers that they look at.

    Attributes:
        task: template, data and base.
        metrics: ready for use; empty where the config names none.
        at: keeps the answers.
    """

    task: EncodedTask
    metrics: Sequence[Metric]
    at: Workspace
    _given: dict[tuple[str, str, str], ContextAnswers] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.metrics)

    def answers(self, context: Context, split: str = "validation") -> ContextAnswers:
        """The base's answers under a context to the first ``evaluate.rows`` rows of a split."""
        identity = context.name, context.sha256(), split
        if identity not in self._given:
            self._given[identity] = self._answers(context, split)
        return self._given[identity]

    def _answers(self, context: Context, split: str) -> ContextAnswers:
        task, settings = self.task, self.task.config.evaluate
        rows = context.bodies(task.rows_for(context, split)).rows[: settings.rows]
        limit = self._limit(context.tokens, rows)
        stream = [(row.example_id, row.body) for row in rows]
        key = key_of(
            ANSWERS_VERSION,
            [task.base.identity, str(task.base.dtype), context.sha256(), stream, limit, settings.batch_size],
        )
        path = self.at.directory / "answers" / f"{file_name(context.name)}.{split}.jsonl"
        stored = self.at.directory.rows(path, key, len(rows))
        if stored is None:
            with (
                self.at.directory.ledger(f"answers/{file_name(context.name)}.{split}") as entry,
                self.at.progress.bar(f"answers under {context.name}", len(rows)) as bar,
            ):
                ids = self._generated(context.prefix(task.base), rows, limit, advance(bar))
                entry.tokens_in = context.tokens + sum(len(row.body) for row in rows)
                entry.tokens_out = sum(map(len, ids))
            stored = write_rows(
                path,
                key,
                [
                    {"example_id": row.example_id, "answer": answer_text(task.base, one), "cut": len(one) >= limit}
                    for row, one in zip(rows, ids, strict=True)
                ],
            )
        texts = [str(row["answer"]) for row in stored]
        return ContextAnswers(context, texts, [bool(row["cut"]) for row in stored], self._ratios(texts, split))

    def value_after(self, prefix: Prefix, label: str) -> float:
        """The mean of one metric's headline quantity over the answers after a prefix to the selection rows; nothing is
        stored. 0 where it is not defined.
        """
        rows = self.task.bare_rows("selection").rows[: self.task.config.evaluate.rows]
        limit = self._limit(len(prefix), rows)
        texts = [answer_text(self.task.base, ids) for ids in self._generated(prefix, rows, limit)]
        return self._mean(self._ratios(texts, "selection"), label) or 0.0

    def _limit(self, tokens: int, rows: Sequence[Row]) -> int:
        """Where answers after so many tokens and these bodies are cut: at the config's limit or the window's end."""
        room = self.task.base.geometry.window - tokens - max(len(row.body) for row in rows)
        return max(0, min(self.task.config.evaluate.max_new_tokens, room))

    def _generated(
        self, prefix: Prefix, rows: Sequence[Row], limit: int, progress: Callable[[int], None] | None = None
    ) -> list[tuple[int, ...]]:
        if limit == 0:
            return [()] * len(rows)
        return generate(
            self.task.base,
            prefix,
            [row.body for row in rows],
            max_new_tokens=limit,
            stop=self.task.answer_ends,
            batch_size=self.task.config.evaluate.batch_size,
            progress=progress,
        )

    def _ratios(self, texts: Sequence[str], split: str) -> list[dict[str, Ratio]]:
        """What the metrics say of the answers to the first rows of a split."""
        items = [
            Item(example.id, example.values, self.task.expected[example.id], text)
            for example, text in zip(self._examples(split), texts, strict=False)
        ]
        ratios: list[dict[str, Ratio]] = [{} for _ in items]
        for metric in self.metrics:
            for of_row, verdict in zip(ratios, metric.verdicts(items), strict=True):
                of_row.update(verdict.ratios)
        return ratios

    def _examples(self, split: str) -> Sequence[Example]:
        examples: Sequence[Example] = getattr(self.task.dataset, split)
        return examples[: self.task.config.evaluate.rows]

    # ---- what the metrics say

    def estimates(self, answers: ContextAnswers) -> dict[str, Estimate]:
        """Mean and interval of every quantity over the rows."""
        config = self.task.config
        by_context, _ = summarize({"": answers.ratios}, {}, seed=config.seed, resamples=config.score.resamples)
        return by_context[""]

    def headline(self, answers: ContextAnswers, label: str) -> float | None:
        """The mean of one metric's headline quantity; None where it is not defined."""
        return self._mean(answers.ratios, label)

    def _mean(self, ratios: Sequence[Mapping[str, Ratio]], label: str) -> float | None:
        """The mean alone, which needs no bootstrap."""
        [metric] = [metric for metric in self.metrics if metric.label == label]
        name = metric.headline_among([name for row in ratios for name in row])
        above, below = (sum(row[name][side] for row in ratios if name in row) for side in (0, 1))
        return _quotient((above, below))

    def headlines(self, answers: ContextAnswers) -> list[str]:
        """The quantity that stands for each metric."""
        known = list(dict.fromkeys(name for row in answers.ratios for name in row))
        return [metric.headline_among(known) for metric in self.metrics]

    def document(self, answered: Sequence[ContextAnswers]) -> AnswersDocument:
        """Answers of the validation rows under several contexts side by side."""
        names = self.headlines(answered[0])
        passing = [name for name, metric in zip(names, self.metrics, strict=True) if metric.pass_or_fail]
        return AnswersDocument(
            split="validation",
            max_new_tokens=self.task.config.evaluate.max_new_tokens,
            headlines=names,
            pass_or_fail=passing,
            contexts=[
                NamedContext(name=a.context.name, kind=a.context.kind, tokens=a.context.tokens) for a in answered
            ],
            examples=[
                AnsweredExample(
                    id=example.id,
                    values=dict(example.values),
                    output=example.output,
                    answers={
                        a.context.name: ContextAnswer(
                            text=a.texts[i],
                            cut=a.cut[i],
                            metrics={name: _quotient(a.ratios[i].get(name)) for name in names},
                        )
                        for a in answered
                    },
                )
                for i, example in enumerate(self._examples("validation"))
            ],
            stands_on=self.task.stands_on,
        )

    def write(self, answered: Sequence[ContextAnswers]) -> None:
        """Write ``answers.json``, or remove one of an earlier config that had metrics."""
        if self and answered:
            write_document(self.at.directory / ANSWERS, self.document(answered))
        else:
            (self.at.directory / ANSWERS).unlink(missing_ok=True)

    @cached_property
    def rows(self) -> int:
        """Validation rows that are answered."""
        return len(self._examples("validation"))


def task_metrics(task: EncodedTask, at: Workspace) -> TaskMetrics:
    """The metrics of ``evaluate.metrics``, where the config sets it. A judge is left to ``kvopt evaluate``, since its
    calls cost time and money. Raises InputError for a metric that cannot be used.
    """
    settings = task.config.evaluate
    if "metrics" not in settings.model_fields_set:
        return TaskMetrics(task, [], at)
    for metric in settings.metrics:
        if metric.remote:
            at.say(f"{metric.label} asks an endpoint: kvopt evaluate measures it, kvopt run does not")
    ready = [metric.prepared(task.inputs.base_dir) for metric in settings.metrics if not metric.remote]
    return TaskMetrics(task, ready, at)


def _quotient(ratio: Ratio | None) -> float | None:
    return ratio[0] / ratio[1] if ratio and ratio[1] else None
