"""Evaluating the base and students: the stages, what each stores, and the document that comes of it.

For each model and context a file ``students/NAME/evaluation/CONTEXT.jsonl`` holds the answer and the gold likelihood of
every row, with the key of everything these depend on; what is there is not computed again. ``evaluation.json`` above it
is made from those files (:class:`kvopt.documents.evaluation_file.EvaluationDocument`).
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvopt.base.generate import answer_text, generate
from kvopt.config.metrics import Item, Metric, Verdict
from kvopt.config.mutations import EndpointSettings
from kvopt.console.progress import Bar, advance
from kvopt.documents.evaluation_file import WORDINGS, EvaluationDocument
from kvopt.documents.validated import write_document
from kvopt.errors import counted
from kvopt.storage.files import file_name, sha256_json
from kvopt.storage.keyed_rows import write_rows
from kvopt.train.evaluation.conditions import Condition
from kvopt.train.evaluation.evaluation_plan import EvaluationPlan
from kvopt.train.evaluation.frozen import frozen_answers, frozen_template
from kvopt.train.evaluation.likelihood import likelihoods
from kvopt.train.evaluation.models import BASE, Subject, subject
from kvopt.train.evaluation.results import Measured, build_document, measured
from kvopt.train.evaluation.sensitivity import log_probs

VERSION = 1
"""Raise it when the same inputs give other answers or likelihoods."""
UNANSWERED = "failed:"
"""How the note of an answer begins that an endpoint never judged."""


class Evaluator(EvaluationPlan):
    """Measures models as the plan says; each stage is stored as it ends."""

    @property
    def drawing(self) -> dict[str, Any]:
        """How tokens of answers are chosen; the seed counts only where they are drawn."""
        drawn = self.settings.temperature > 0
        return {"temperature": self.settings.temperature, "seed": self.task.config.seed if drawn else 0}

    # ---- one model

    def evaluate(self, model: Subject) -> EvaluationDocument:
        """All stages for one model; returns the document, which is written unless conditions were chosen."""
        return self.document(model, self.measure(model))

    def measure(self, model: Subject) -> Measured:
        """All stages for one model, each stored as it ends."""
        work = len(self.conditions) * (len(self.answered) + len(self.scored))
        begin = f"evaluating {model.name} under {counted(len(self.conditions), 'context')}"
        with self.at.progress.bar(model.name, work, begin=begin) as bar:
            rows = {condition.name: self.answers(model, condition, bar) for condition in self.conditions}
        verdicts = {name: self._verdicts(model, name, of_context) for name, of_context in rows.items()}
        results = measured(
            self.conditions,
            rows,
            verdicts,
            frozen=self.frozen(model) if self.whole and self.settings.frozen else None,
            probes=self.probed(model) if self.probes else None,
            base_probes=self.probed(subject(self.task, BASE, self.at)) if self.probes else None,
            moved=self.moved(model, rows) if self.settings.posix is not None else None,
        )
        model.release()
        return results

    def document(self, model: Subject, results: Measured) -> EvaluationDocument:
        """The document of what was measured, which is written unless conditions were chosen."""
        document = build_document(self, model, results)
        if self.whole:
            write_document(model.folder / "evaluation.json", document)
        return document

    def answers(self, model: Subject, condition: Condition, bar: Bar) -> list[dict[str, Any]]:
        """Answer (of the first ``rows`` rows) and gold likelihood of every validation row under one context."""
        rows = condition.context.bodies(self.task.rows_for(condition.context, "validation")).rows
        stream = [(row.example_id, row.body, row.gold) for row in rows]
        limits = [len(self.answered), self.settings.max_new_tokens, self.drawing]
        key = self._key(model, [condition.context.sha256(), stream, limits])
        path = self._path(model, f"{file_name(condition.name)}.jsonl")
        stored = self.at.directory.rows(path, key, len(rows))
        if stored is not None and (self.settings.posix is None or "answer_ids" in stored[0]):
            bar.take_over(len(self.answered) + len(rows))
            return stored
        limit = self.settings.max_new_tokens
        with self.at.directory.ledger(f"evaluate/{model.name}/{condition.name}") as entry:
            prefix = condition.context.prefix(model.model)
            batch_size = self.settings.batch_size
            scores = likelihoods(
                model.model, self.task.base, prefix, rows, self.reference, batch_size=batch_size,
                progress=advance(bar),
            )  # fmt: skip
            bodies = [row.body for row in rows[: len(self.answered)]]
            ids = generate(
                model.model, prefix, bodies, max_new_tokens=limit, stop=self.task.answer_ends, batch_size=batch_size,
                progress=advance(bar), **self.drawing,
            )  # fmt: skip
            tokens = condition.context.tokens + sum(map(len, rows)) + sum(map(len, bodies))
            entry.tokens_in, entry.tokens_out = tokens, sum(map(len, ids))
        texts = [answer_text(model.model, one) for one in ids]
        entries = []
        for i, (example, score) in enumerate(zip(self.scored, scores, strict=True)):
            row: dict[str, Any] = {"example_id": example.id, "gold": example.output}
            if i < len(ids):
                row |= {"answer": texts[i], "answer_tokens": len(ids[i]), "cut": len(ids[i]) >= limit}
                row |= {"answer_ids": list(ids[i])} if self.settings.posix is not None else {}
            entries.append(row | asdict(score))
        return write_rows(path, key, entries)

    def moved(self, model: Subject, rows: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """Log probabilities of every answer to the first rows under every wording (see
        :func:`kvopt.train.evaluation.sensitivity.posix`).
        """
        wordings = [condition for condition in self.conditions if condition.group in WORDINGS]
        names, count = [condition.name for condition in wordings], min(self.settings.posix or 0, len(self.answered))
        answers = [[rows[name][i]["answer_ids"] for name in names] for i in range(count)]
        bodies = {
            c.name: [row.body for row in c.context.bodies(self.task.rows_for(c.context, "validation")).rows[:count]]
            for c in wordings
        }
        key = self._key(model, ["posix", [(c.name, c.context.sha256(), bodies[c.name]) for c in wordings], answers])
        path = self._path(model, "posix.jsonl")
        if (stored := self.at.directory.rows(path, key, count)) is not None:
            return stored
        found = {}
        with (
            self.at.directory.ledger(f"evaluate/{model.name}/posix") as entry,
            self.at.progress.bar("POSIX", count * len(names) ** 2) as bar,
        ):
            for c in wordings:
                found[c.name] = log_probs(
                    model.model, c.context.prefix(model.model), bodies[c.name], answers,
                    batch_size=self.settings.batch_size, progress=advance(bar),
                )  # fmt: skip
                answered = sum(len(answer) for of_row in answers for answer in of_row)
                entry.tokens_in = (
                    (entry.tokens_in or 0) + c.context.tokens + answered + len(names) * sum(map(len, bodies[c.name]))
                )
        entries = [
            {
                "example_id": rows[names[0]][i]["example_id"],
                "tokens": {name: len(answer) for name, answer in zip(names, answers[i], strict=True)},
                "log_probs": {name: dict(zip(names, found[name][i], strict=True)) for name in names},
            }
            for i in range(count)
        ]
        return write_rows(path, key, entries)

    # ---- metrics

    def _verdicts(self, model: Subject, condition: str, rows: list[dict[str, Any]]) -> dict[str, list[Verdict]]:
        """What each metric says about the answers under one context."""
        items = [
            Item(row["example_id"], example.values, self.task.expected[row["example_id"]], row["answer"])
            for row, example in zip(rows, self.answered, strict=False)
        ]
        by_metric = {}
        for metric, settings in zip(self.metrics, self.settings.metrics, strict=True):
            if metric.remote:
                asked = (
                    settings.identity() if isinstance(settings, EndpointSettings) else settings.model_dump(mode="json")
                )
                key = sha256_json([rows[0]["key"], asked, len(items)])[:16]
                path = self._path(model, f"{file_name(condition)}.{file_name(metric.label)}.jsonl")
                by_metric[metric.label] = self._remote_verdicts(metric, items, path, key)
            else:
                by_metric[metric.label] = metric.verdicts(items)
        return by_metric

    def _remote_verdicts(self, metric: Metric, items: list[Item], path: Path, key: str) -> list[Verdict]:
        """Stored verdicts; answers that the endpoint never judged are sent again."""
        stored = self.at.directory.rows(path, key, len(items)) or []
        verdicts = {
            i: Verdict({q: (r[0], r[1]) for q, r in row["ratios"].items()}, row["note"]) for i, row in enumerate(stored)
        }
        open_ = [i for i in range(len(items)) if i not in verdicts or _unanswered(verdicts[i])]
        if open_:
            with self.at.progress.bar(metric.label, len(open_)) as bar:
                for i, verdict in zip(open_, metric.verdicts([items[i] for i in open_], advance(bar)), strict=True):
                    verdicts[i] = verdict
        in_order = [verdicts[i] for i in range(len(items))]
        if open_:
            rows = [
                {"example_id": item.example_id, "ratios": {q: list(r) for q, r in v.ratios.items()}, "note": v.note}
                for item, v in zip(items, in_order, strict=True)
            ]
            write_rows(path, key, rows)
        if failed := [verdict for verdict in in_order if not verdict.ratios[metric.headline][1]]:
            what = f"{metric.label} has no score for {len(failed)} of {counted(len(in_order), 'answer')} ({path.stem})"
            self.at.say(f"warning: {what}, for the first because of: {failed[0].note}")
        return in_order

    # ---- probes

    def frozen(self, model: Subject) -> list[list[str]]:
        """Answers under each instruction that asks for something else, [instruction][row]."""
        settings = self.settings.frozen
        assert settings is not None
        examples = self.answered[: settings.rows]
        limit = settings.max_new_tokens or self.settings.max_new_tokens
        templates = [frozen_template(self.task.template, instruction) for instruction in settings.instructions]
        asked = [[t.to_json() for t in templates], [(e.id, e.values) for e in examples], limit, self.drawing]
        key, path = self._key(model, ["frozen", asked]), self._path(model, "frozen-prompt.jsonl")
        stored = self.at.directory.rows(path, key, len(templates) * len(examples))
        if stored is None:
            with (
                self.at.directory.ledger(f"evaluate/{model.name}/frozen-prompt"),
                self.at.progress.bar("frozen prompts", len(templates) * len(examples)) as bar,
            ):
                answers = [
                    frozen_answers(
                        model.model, self.task.encoder, template, examples, max_new_tokens=limit,
                        stop=self.task.answer_ends, batch_size=self.settings.batch_size, progress=advance(bar),
                        **self.drawing,
                    )
                    for template in templates
                ]  # fmt: skip
            stored = write_rows(
                path,
                key,
                [
                    {"instruction": instruction, "example_id": example.id, "answer": answer}
                    for instruction, of_instruction in zip(settings.instructions, answers, strict=True)
                    for example, answer in zip(examples, of_instruction, strict=True)
                ],
            )
        flat = [row["answer"] for row in stored]
        return [flat[start : start + len(examples)] for start in range(0, len(flat), len(examples))]

    def probed(self, model: Subject) -> list[dict[str, Any]]:
        """Gold likelihood of every probe row."""
        assert self.probes is not None
        rows = self.probes.encoded.rows
        key, path = self._key(model, ["probes", self.probes.sha256()]), self._path(model, "probes.jsonl")
        if (stored := self.at.directory.rows(path, key, len(rows))) is not None:
            return stored
        reference = self.probes.make_reference(self.at)
        with (
            self.at.directory.ledger(f"evaluate/{model.name}/probes") as entry,
            self.at.progress.bar("probes", len(rows)) as bar,
        ):
            entry.tokens_in = sum(map(len, rows))
            scores = likelihoods(
                model.model,
                self.task.base,
                self.probes.prefix(model.model),
                rows,
                reference,
                batch_size=self.settings.batch_size,
                progress=advance(bar),
            )
        entries = [{"example_id": row.example_id, **asdict(score)} for row, score in zip(rows, scores, strict=True)]
        return write_rows(path, key, entries)

    # ---- keys and places

    def _key(self, model: Subject, parts: list[Any]) -> str:
        """Identity of everything that a stage's rows depend on."""
        task = self.task
        shared = [
            VERSION,
            model.identity,
            str(task.base.dtype),
            task.base.device.type,
            self.reference.key,
            sorted(task.answer_ends),
            self.settings.batch_size,
        ]
        return sha256_json([shared, parts])[:16]

    @staticmethod
    def _path(model: Subject, name: str) -> Path:
        return model.folder / "evaluation" / name


def _unanswered(verdict: Verdict) -> bool:
    return str(verdict.note).startswith(UNANSWERED)
