"""What the command line asks of a run about students: train them, evaluate them, conduct a study.

Each opens the stages of a run in the right order; the stages themselves are functions of their inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from kvopt.config.document import Config
from kvopt.config.evaluation import EvaluateConfig
from kvopt.config.students import StudentConfig
from kvopt.documents.evaluation_file import EvaluationDocument
from kvopt.documents.student_record import StudentRecord
from kvopt.documents.study_file import StudyDocument
from kvopt.errors import InputError
from kvopt.run.run import Run
from kvopt.train.arms import settings_of, study_arms, trained_students
from kvopt.train.early_checks import check_evaluation
from kvopt.train.evaluation.conditions import (
    Condition,
    check_names,
    conditions,
    conditions_named,
    evaluated_names,
    names_behind,
)
from kvopt.train.evaluation.evaluate import Evaluator
from kvopt.train.evaluation.models import subjects
from kvopt.train.evaluation.probes import load_probes
from kvopt.train.study.study import Placed, StudyRunner
from kvopt.train.training import (
    check_student,
    chosen,
    contexts_of,
    make_students,
    needs_reference,
    student_paths,
)
from kvopt.train.workers import Voice, Workers, on_own_device


def train_students(run: Run, only: Sequence[str] = ()) -> list[StudentRecord]:
    """Train the config's students (or those in ``only``) in order; returns the record of each.

    Raises:
        InputError: an unknown student or context, settings that do not fit. KvoptError: a student diverged.
    """
    configs = chosen(run.inputs, only)
    if not configs:
        raise InputError("the config has none", where="students", fix="kvopt config prints an example")
    with run.opened():
        records = train_chosen(run, configs)
        set_aside_others(run)
    return records


def train_chosen(run: Run, configs: Sequence[StudentConfig]) -> list[StudentRecord]:
    """As :func:`train_students`, in a run that is open; ``configs`` from :func:`chosen`."""
    catalogue = run.catalogue(contexts_of(run.inputs, configs))
    reference = run.whole_reference() if needs_reference(configs) else None
    return make_students(catalogue, configs, reference, run.at)


def set_aside_others(run: Run) -> None:
    """Put aside the students of an open run that its config no longer names, with what was measured of them. What was
    written there by hand or by another command (a soup) is none of the run's students and stays.
    """
    named = {student.name for student in trained_students(run.config)}
    for stage in [stage for stage in run.directory.manifest.stages if stage.startswith("students/")]:
        if (name := stage.removeprefix("students/")) not in named:
            run.directory.set_aside(stage, *student_paths(name))


def evaluator_of(
    run: Run,
    students: Sequence[StudentConfig],
    settings: EvaluateConfig | None = None,
    specs: Sequence[str] = (),
    only: Sequence[Condition] | None = None,
) -> Evaluator:
    """What measures models of an open run.

    Args:
        students: all that the config trains (their mutations are not held out).
        settings: instead of the config's ``evaluate`` section.
        specs: contexts by name, instead of those of the section.
        only: these conditions, instead of those of the section.
    """
    settings = settings or run.config.evaluate
    task = run.task()
    whole = not specs and only is None
    probes = None
    if settings.probes is not None and only is None:
        probes = load_probes(task, settings.probes, settings.batch_size)
    if only is None and specs:
        only = _named(run, specs, settings, students)
    if only is None:
        catalogue = run.catalogue(evaluated_names(run.inputs, settings, students))
        only = conditions(catalogue, settings, students)
    return Evaluator(task, only, run.reference(), settings, run.at, probes if whole else None, whole)


def _named(
    run: Run, specs: Sequence[str], settings: EvaluateConfig, students: Sequence[StudentConfig]
) -> list[Condition]:
    """The conditions that ``--context`` names: one of the config's, a whole group, or any other context. Mutations and
    learned contexts are made only where a spec asks for them.
    """
    named: list[Condition] = []
    for spec in specs:
        catalogue = run.catalogue(names_behind(spec, run.inputs, settings, students))
        known = conditions_named(spec, catalogue, settings, students)
        named += known or [Condition("other", context) for context in run.stored_contexts(spec)]
    unique = list({condition.name: condition for condition in named}.values())
    check_names(unique, "--context")
    return unique


def evaluate_all(run: Run, names: Sequence[str] = (), specs: Sequence[str] = ()) -> list[EvaluationDocument]:
    """``kvopt evaluate``: the documents of these models (default: the base and every trained student), under these
    contexts (default: those of the config).
    """
    models = subjects(run.task(), run.at, names)
    check_evaluation(run.inputs)
    evaluator = evaluator_of(run, trained_students(run.config), specs=specs)
    return [evaluator.evaluate(model) for model in models]


def study_runner(run: Run) -> StudyRunner:
    """The study of an open run; its arms are checked before any work. Raises InputError."""
    arms = study_arms(run.config)
    for arm in arms:
        check_student(run.inputs, arm.config)
    students = trained_students(run.config)
    catalogue = run.catalogue(contexts_of(run.inputs, [arm.config for arm in arms]))
    evaluator = evaluator_of(run, students, settings_of(run.config).evaluate)
    return StudyRunner(catalogue, evaluator, run.whole_reference(), lambda c: run.score(c, "selection"), run.at)


def conduct_study(
    run: Run, report: Callable[[StudyDocument], None] | None = None, workers: Workers | None = None
) -> StudyDocument:
    """``kvopt study`` in an open run: train and evaluate what is missing, in ``workers`` where some are given; returns
    the document of ``study.json``.
    """
    document = study_runner(run).conduct(report, None if workers is None else partial(_by_workers, run, workers))
    set_aside_others(run)
    return document


def _by_workers(run: Run, workers: Workers, students: Sequence[Placed]) -> None:
    """Make students of a study in worker processes."""
    arms, place = study_arms(run.config), (run.config, run.inputs.base_dir.resolve(), run.directory.path.resolve())
    calls = [(*place, student, arms[student[0]].student(student[1]).name) for student in students]
    with run.at.progress.bar("students", len(calls), unit="student") as bar:
        for _ in workers.each(_make_in_worker, calls):
            bar.update()
            run.at.say(bar.line)
    run.directory.workers_left()


def _make_in_worker(config: Config, base_dir: Path, out: Path, student: Placed, name: str) -> None:
    voice = Voice()
    run = Run(on_own_device(config), base_dir, out, say=voice, bars=False)
    with run.directory.joined(name):
        runner = study_runner(run)
        voice.is_on = True
        runner.make(student)
