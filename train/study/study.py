"""``kvopt study``: every arm with every seed trained, evaluated and compared; killed anywhere, it goes on.

Seeds are the outer loop, so that a study that is stopped early has whole rounds of all arms. ``study.json`` is written
after each student and says with ``complete`` whether all are in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from kvopt.config.document import Config
from kvopt.config.students import StudentConfig
from kvopt.config.study import StudyConfig
from kvopt.contexts.context import Context
from kvopt.documents.evaluation_file import EvaluationDocument
from kvopt.documents.ledger import read_ledger
from kvopt.documents.student_record import StudentRecord
from kvopt.documents.study_file import StudyDocument
from kvopt.documents.validated import write_document
from kvopt.errors import InputError, KvoptError
from kvopt.measure.reference import Reference
from kvopt.measure.score import Score
from kvopt.run.catalogue import Catalogue
from kvopt.run.directory import Workspace
from kvopt.storage.files import canonical_json, read_json, write_json
from kvopt.train.arms import EQUAL_SECONDS, Arm, reference_of, settings_of, study_arms
from kvopt.train.evaluation.evaluate import Evaluator
from kvopt.train.evaluation.models import BASE, subject
from kvopt.train.evaluation.results import Measured
from kvopt.train.pool import names_of
from kvopt.train.study.summary import Result, build_document, check_quantities
from kvopt.train.study.values import draws_by_path
from kvopt.train.training import UNRELATED, make_students

Placed = tuple[int, int, int | None]
"""A student of a study: its arm's number, its seed, and its steps where they replace the budget."""


@dataclass(frozen=True)
class StudyRunner:
    """One study in one run directory.

    Attributes:
        catalogue: holds the contexts of every arm.
        evaluator: measures the base and each student.
        reference: of the base under the original template.
        score: a context's score on the selection rows.
        at: where students and documents go.
    """

    catalogue: Catalogue
    evaluator: Evaluator
    reference: Reference
    score: Callable[[Context], Score]
    at: Workspace

    @property
    def config(self) -> Config:
        return self.catalogue.task.config

    @cached_property
    def settings(self) -> StudyConfig:
        return settings_of(self.config)

    @cached_property
    def arms(self) -> list[Arm]:
        return study_arms(self.config)

    @cached_property
    def reference_arm(self) -> str:
        """Name of the arm that others are compared with."""
        return reference_of(self.config)

    @cached_property
    def _context_scores(self) -> dict[str, tuple[float, float]]:
        return {}

    def conduct(
        self,
        report: Callable[[StudyDocument], None] | None = None,
        beforehand: Callable[[Sequence[Placed]], None] | None = None,
    ) -> StudyDocument:
        """Train and evaluate what is missing; returns the document of ``study.json``.

        Args:
            report: gets the document so far after each student.
            beforehand: trains and evaluates these students, none of which needs another of them, in this run directory
                (:mod:`kvopt.train.workers`); they are then found there.
        """
        self._check_distinct()
        base = self.evaluator.evaluate(subject(self.catalogue.task, BASE, self.at))
        check_quantities(self.config, base)
        if beforehand is not None:
            beforehand(self._at_equal_budget())
            beforehand(self._at_equal_seconds())
        results: list[Result] = []
        document = self._written(base, results, False)
        done: dict[str, Result] = {}
        with self.at.progress.bar("study", self.size, unit="student") as bar:
            for seed, arm in product(self.settings.seeds, self.arms):
                done = {} if arm is self.arms[0] else done
                self.at.say(f"arm {arm.name}, seed {seed}, equal {arm.budget}: {len(results) + 1} of {self.size}")
                worked = self.at.directory.stages_worked
                result = self._result(arm, seed, done)
                if arm.budget != EQUAL_SECONDS:
                    done[arm.name] = result
                results.append(result)
                document = self._written(base, results, len(results) == self.size)
                if report:
                    report(document)
                (bar.update if self.at.directory.stages_worked > worked else bar.take_over)(1)
        return document

    def _at_equal_budget(self) -> list[Placed]:
        return [
            (i, seed, None)
            for seed, (i, arm) in product(self.settings.seeds, enumerate(self.arms))
            if arm.budget != EQUAL_SECONDS
        ]

    def _at_equal_seconds(self) -> list[Placed]:
        """Once the others are there."""
        placed: list[Placed] = []
        for seed in self.settings.seeds if self.settings.equal_seconds else ():
            own = [self.arms[i] for i, s, _ in self._at_equal_budget() if s == seed]
            done = {arm.name: self._result(arm, seed, {}) for arm in own}
            late = [(i, arm) for i, arm in enumerate(self.arms) if arm.budget == EQUAL_SECONDS]
            placed += [(i, seed, self._steps_in_time(arm, seed, done)) for i, arm in late]
        return placed

    def make(self, placed: Placed) -> None:
        """Train and evaluate one student."""
        number, seed, steps = placed
        self._measured(self.arms[number].student(seed, steps))

    @property
    def size(self) -> int:
        """How many students there are."""
        return len(self.arms) * len(self.settings.seeds)

    def _written(self, base: EvaluationDocument, results: Sequence[Result], complete: bool) -> StudyDocument:
        document = build_document(self.config, self.arms, self.reference_arm, base, results, complete)
        write_document(self.at.directory / "study.json", document)
        return document

    def _result(self, arm: Arm, seed: int, done: dict[str, Result]) -> Result:
        steps = self._steps_in_time(arm, seed, done) if arm.budget == EQUAL_SECONDS else None
        config = arm.student(seed, steps)
        record, measured, evaluated = self._measured(config)
        draws = draws_by_path(measured, seed=self.config.seed, resamples=self.evaluator.settings.resamples)
        kl, nll = self._context_set(config)
        return Result(arm, seed, record, self._seconds(config.name, record.steps or 0), evaluated, kl, nll, draws)

    def _measured(self, config: StudentConfig) -> tuple[StudentRecord, Measured, EvaluationDocument]:
        """A student and what was measured of it, as they are there or made now."""
        record = make_students(self.catalogue, [config], self.reference, self.at)[0]
        model = subject(self.catalogue.task, config.name, self.at)
        measured = self.evaluator.measure(model)
        return record, measured, self.evaluator.document(model, measured)

    # ---- equal seconds

    def _steps_in_time(self, arm: Arm, seed: int, done: dict[str, Result]) -> int:
        """Steps that the arm makes, at the pace of its own run, in the seconds of the reference's; kept in
        ``study-steps.json``, so that a study that goes on does not measure again.
        """
        own, reference = done[arm.name], done[self.reference_arm]
        name = arm.student(seed).name
        keys = [own.record.key, reference.record.key]
        path = self.at.directory / "study-steps.json"
        stored = read_json(path) if path.is_file() else {}
        if stored.get(name, {}).get("keys") != keys:
            if own.seconds is None or reference.seconds is None:
                missing = own if own.seconds is None else reference
                raise KvoptError(
                    f"the ledger does not say how long {missing.record.name} took, so {name} gets no equal seconds;"
                    " delete that student to train it again, or take the arm out of study.equal_seconds"
                )
            own_steps = own.record.steps or 0
            pace = own.seconds / max(1, own_steps)
            steps = max(1, int(reference.seconds / pace)) if pace > 0 else own_steps
            stored[name] = {"keys": keys, "steps": steps}
            write_json(path, stored)
        return int(stored[name]["steps"])

    def _seconds(self, name: str, steps: int) -> float | None:
        """Wall-clock seconds of a student's training, from the ledger; of one that was gone on with, at the pace of
        its last part.
        """
        entries = read_ledger(self.at.directory / "ledger.jsonl")
        mine = [entry for entry in entries if entry.stage == f"students/{name}" and entry.outcome == "done"]
        if not mine or mine[-1].steps != steps:
            return None
        trained = steps - mine[-1].resumed_from
        return mine[-1].seconds * steps / trained if trained > 0 else None

    # ---- the contexts themselves

    def _chosen(self, config: StudentConfig) -> Iterator[tuple[Context, float]]:
        """The contexts that a student is trained under, with their weights."""
        taken: set[str] = set()
        where = f"students.{config.name}.contexts"
        for choice, name in zip(config.contexts, names_of(config), strict=True):
            for context in self.catalogue.named(name, where, seed=config.seed or 0, taken=taken):
                taken.add(context.name)
                yield context, choice.weight

    def _check_distinct(self) -> None:
        """Raises InputError where two arms come to the same contexts with every seed, and have the same settings: of
        few mutations, the best four may be the most different four too.
        """
        seen: dict[str, str] = {}
        for arm in self.arms:
            students = [arm.student(seed) for seed in self.settings.seeds]
            contexts = [sorted((context.name, weight) for context, weight in self._chosen(s)) for s in students]
            settings = students[0].model_dump(mode="json", exclude=(UNRELATED | {"seed"}) - {"start"})
            first = seen.setdefault(canonical_json([arm.budget, settings, contexts]), arm.name)
            if first != arm.name:
                what = f"{first} and {arm.name} are the same student: {', '.join(name for name, _ in contexts[0])}"
                raise InputError(what, where="study.arms", fix="leave one out, or make more mutations to choose from")

    def _context_set(self, config: StudentConfig) -> tuple[float, float]:
        """Weighted means of forward KL and of gold NLL under the base (the loss before any update) of the contexts that
        a student is trained under, on selection rows.
        """
        total = kl = nll = 0.0
        for context, weight in self._chosen(config):
            if context.name not in self._context_scores:
                score = self.score(context)
                self._context_scores[context.name] = (score.kl_forward.mean, score.gold_nll.mean)
            of_kl, of_nll = self._context_scores[context.name]
            total, kl, nll = total + weight, kl + weight * of_kl, nll + weight * of_nll
        return kl / total, nll / total
