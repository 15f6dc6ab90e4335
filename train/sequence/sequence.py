"""A sequence of tasks with SAPO's protocol: stages are trained one after the other, each from the last one's student,
and after every stage every task is measured under its original template.

With a state-adaptive schedule, an arm scores the pool of a stage (the original and mutations of that task's template)
under the student as it then is, by gold NLL on the first rows, and trains on the lowest. Each stage's student lies in
``tasks/TASK/students/ARM/``, what was measured of it in ``tasks/TASK/sequence/ARM/after-STAGE/``; what is there is not
done again. ``sequence.json`` is made from those (:class:`kvopt.documents.sequence_file.SequenceDocument`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kvopt.base.launch import one_process
from kvopt.base.loading import Base
from kvopt.config.sequence import SequenceConfig
from kvopt.console.progress import Bar, Progress
from kvopt.documents.evaluation_file import EvaluationDocument
from kvopt.documents.sequence_file import SequenceArm, SequenceDocument, SequenceStage, TransferMeans
from kvopt.documents.student_record import StudentRecord
from kvopt.documents.validated import write_document
from kvopt.train.commands import evaluator_of, train_chosen
from kvopt.train.evaluation.conditions import Condition
from kvopt.train.evaluation.evaluate import Evaluator
from kvopt.train.evaluation.models import BASE, Subject, subject
from kvopt.train.sequence.tasks import SequenceTask, load_tasks, opened
from kvopt.train.sequence.transfer import transfer
from kvopt.train.student import load_student
from kvopt.train.training import chosen
from kvopt.train.workers import Voice, Workers, on_own_device

FORMAT_VERSION = 1
Scores = dict[str, float | None]
"""Quantity to mean."""


@dataclass(frozen=True)
class _Learned:
    """A stage's student, loaded once for all tasks."""

    folder: Path
    base: Base

    @cached_property
    def model(self) -> Base:
        return load_student(self.folder, self.base)


@dataclass(frozen=True)
class _After(Subject):
    """A stage's student as it is measured on some task."""

    learned: _Learned | None = None

    @cached_property
    def model(self) -> Base:
        assert self.learned is not None
        return self.learned.model


def conduct(
    config: SequenceConfig,
    tasks: Sequence[SequenceTask],
    out: Path,
    beforehand: Callable[[Sequence[str]], None] | None = None,
) -> SequenceDocument:
    """Train every arm through all stages, measure, and write ``sequence.json``; returns it.

    Args:
        beforehand: takes these arms through all stages in ``out``, as :func:`by_workers` does; they are then found
            there.

    Raises:
        InputError: a task's settings do not fit, or several processes. KvoptError: a student diverged.
    """
    one_process("a sequence")
    with opened(list(tasks)):
        evaluations, documents = _of_base(config, tasks)
        before, names = _common(documents)
        if beforehand is not None:
            beforehand([arm.name for arm in config.arms])
            for task in tasks:
                task.run.directory.workers_left()
        with tasks[0].run.at.progress.bar("sequence", len(config.arms) * len(tasks), unit="stage") as bar:
            arms = [_arm(arm.name, tasks, evaluations, before, names, bar) for arm in config.arms]
        headlines = [name for name in documents[0].headlines if name in names]
        base = tasks[0].run.load_base().name
    document = SequenceDocument(
        format_version=FORMAT_VERSION,
        name=config.name,
        base=base,
        tasks=[task.name for task in tasks],
        headlines=headlines,
        quantities=names,
        arms=arms,
    )
    write_document(out / "sequence.json", document)
    return document


def _of_base(config: SequenceConfig, tasks: Sequence[SequenceTask]) -> tuple[list[Evaluator], list[EvaluationDocument]]:
    """What measures each task, and what it says of the base."""
    evaluations = [_evaluator(config, task) for task in tasks]
    pairs = zip(evaluations, tasks, strict=True)
    return evaluations, [e.evaluate(subject(task.run.task(), BASE, task.run.at)) for e, task in pairs]


def _common(documents: Sequence[EvaluationDocument]) -> tuple[list[Scores], list[str]]:
    """The scores of each task, and the quantities that all of them have."""
    scores = [_scores(document) for document in documents]
    return scores, [name for name in scores[0] if all(name in of_task for of_task in scores)]


def by_workers(
    config: SequenceConfig, base_dir: Path, out: Path, workers: Workers, progress: Progress
) -> Callable[[Sequence[str]], None]:
    """Takes arms through all stages in worker processes, each arm in one."""

    def beforehand(names: Sequence[str]) -> None:
        calls = [(config, base_dir.resolve(), out.resolve(), name) for name in names]
        with progress.bar("arms", len(calls), unit="arm") as bar:
            for _ in workers.each(_arm_in_worker, calls):
                bar.update()
                progress.say(bar.line)

    return beforehand


def _arm_in_worker(config: SequenceConfig, base_dir: Path, out: Path, name: str) -> None:
    voice = Voice()
    tasks = load_tasks(config, base_dir, out, say=voice, bars=False, adapt=on_own_device)
    with opened(tasks, joined=name):
        evaluations, documents = _of_base(config, tasks)
        before, names = _common(documents)
        voice.is_on = True
        with tasks[0].run.at.progress.bar(name, len(tasks), unit="stage") as bar:
            _arm(name, tasks, evaluations, before, names, bar)


def _evaluator(config: SequenceConfig, task: SequenceTask) -> Evaluator:
    return evaluator_of(task.run, config.arms, only=[Condition("original", task.run.task().original)])


def _arm(
    name: str,
    tasks: Sequence[SequenceTask],
    evaluations: Sequence[Evaluator],
    before: list[Scores],
    names: Sequence[str],
    bar: Bar,
) -> SequenceArm:
    """One arm through all stages."""
    after, stages = [before], []
    for number, task in enumerate(tasks, 1):
        task.run.at.say(f"{name}, stage {number} of {len(tasks)}: {task.name}")
        worked = _stages_worked(tasks)
        [record] = train_chosen(task.run, chosen(task.run.inputs, [name]))
        stages.append(_stage(task, record))
        learned = _Learned(task.folder(name), tasks[0].run.load_base())
        after.append(
            [
                _scores(evaluation.evaluate(_subject(measured, name, task, record, learned)))
                for measured, evaluation in zip(tasks, evaluations, strict=True)
            ]
        )
        (bar.update if _stages_worked(tasks) > worked else bar.take_over)(1)
    matrices = {quantity: [[scores[quantity] for scores in row] for row in after] for quantity in names}
    return SequenceArm(name=name, stages=stages, R=matrices, transfer={q: _transfer(r) for q, r in matrices.items()})


def _stages_worked(tasks: Sequence[SequenceTask]) -> int:
    return sum(task.run.directory.stages_worked for task in tasks)


def _subject(
    measured: SequenceTask, arm: str, stage: SequenceTask, record: StudentRecord, learned: _Learned
) -> Subject:
    folder = measured.run.directory / "sequence" / arm / f"after-{stage.name}"
    return _After(measured.run.load_base(), f"{arm} after {stage.name} on {measured.name}", folder, record, learned)


def _scores(document: EvaluationDocument) -> Scores:
    """The means of every quantity under the original."""
    return {name: value.mean for name, value in document.contexts[0].quantities.items()}


def _transfer(matrix: list[list[float | None]]) -> TransferMeans | None:
    """AP, BWT and FWT; None where a score is undefined (no answer to count)."""
    rows = [[value for value in row if value is not None] for row in matrix]
    return transfer(rows).document if all(map(len, rows)) and len({*map(len, rows)}) == 1 else None


def _stage(task: SequenceTask, record: StudentRecord) -> SequenceStage:
    """What a stage trained on."""
    pool = [context.name for context in record.contexts]
    scored = record.stages[-1] if record.stages else None
    return SequenceStage(
        task=task.name,
        contexts=pool,
        kept=scored.kept if scored else pool,
        gold_nll=scored.gold_nll if scored else None,
        steps=record.steps or 0,
        tokens=record.tokens or 0,
        weights_sha256=record.weights_sha256 or "",
    )
