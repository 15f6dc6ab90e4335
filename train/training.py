"""Students as stages of a run: trained in order into ``students/NAME/``, taken from there when nothing they depend on
has changed, gone on with from a checkpoint after a kill.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvopt.base.launch import LAUNCH
from kvopt.config.names import ContextName
from kvopt.config.students import StudentConfig
from kvopt.console.progress import step_reporter
from kvopt.contexts.context import Context, TextContext
from kvopt.documents.student_record import HeldOutPoint, PoolScoring, StudentFacts, StudentRecord, TrainingPoint
from kvopt.errors import InputError, counted
from kvopt.measure.reference import Reference
from kvopt.run.catalogue import Catalogue
from kvopt.run.directory import Workspace
from kvopt.run.encoded_task import EncodedTask
from kvopt.run.inputs import Inputs
from kvopt.storage.files import key_of
from kvopt.train.distill.own_answers import check_own_answers, with_own_answers
from kvopt.train.distill.teacher import Teacher, check_teacher, load_teacher, teacher_name
from kvopt.train.gold import HeldOut
from kvopt.train.job import Job, Trained
from kvopt.train.pool import Pool, PoolContext, build_pool, check_choices, names_of
from kvopt.train.settings import untracked
from kvopt.train.student import read_student_record, save_student, weights_of
from kvopt.train.trainer import TRAINING_VERSION, train_student

UNRELATED = {
    "name", "contexts", "start", "accumulation", "gradient_checkpointing", "checkpoint_every", "log_every", "report_to"
}  # fmt: skip
"""Settings that do not change what a student becomes, but for rounding (contexts and start count by their content)."""

HELD_OUT_ROWS = 32


@dataclass(frozen=True)
class Order:
    """One student to train: what the first process of a launch sends to the others."""

    config: StudentConfig
    pool: Pool
    seed: int
    key: str
    reference: Reference | None
    teacher: PoolContext | None = None
    start: Path | None = None


def chosen(inputs: Inputs, only: Sequence[str] = ()) -> list[StudentConfig]:
    """The students to train, checked. Raises InputError."""
    known = {student.name: student for student in inputs.config.students}
    for name in only:
        if name not in known:
            raise InputError(f"no student {name!r} in the config", fix="known: " + (", ".join(known) or "none"))
    configs = [student for student in inputs.config.students if not only or student.name in only]
    for config in configs:
        check_student(inputs, config)
    return configs


def check_student(inputs: Inputs, config: StudentConfig) -> None:
    """Refuse, before any work, contexts, a teacher, checks or a start that cannot be. Raises InputError."""
    if inputs.config.model.shard is not None:
        raise InputError(
            "students cannot be trained from a sharded base",
            where=f"students.{config.name}",
            fix="train them with a base that fits one device, without model.shard",
        )
    check_choices(inputs, config)
    check_teacher(inputs, config)
    check_own_answers(inputs, config)
    if config.start is not None:
        weights_of(inputs.base_dir / config.start)


def contexts_of(inputs: Inputs, configs: Sequence[StudentConfig]) -> list[ContextName]:
    """Every context that these students need to be in the catalogue: their own and their teachers'."""
    names = [name for config in configs for name in names_of(config)]
    return names + [name for config in configs if (name := teacher_name(inputs, config)) is not None]


def needs_reference(configs: Sequence[StudentConfig]) -> bool:
    """Whether a loss of one of them is anchored in the original template."""
    return any(config.loss.anchor == "original" for config in configs)


def make_students(
    catalogue: Catalogue,
    configs: Sequence[StudentConfig],
    reference: Reference | None,
    at: Workspace,
) -> list[StudentRecord]:
    """Train students in order; returns the record of each.

    Args:
        catalogue: holds what :func:`contexts_of` says.
        configs: from :func:`chosen`.
        reference: where :func:`needs_reference` says so.

    Raises:
        InputError: settings that do not fit. KvoptError: a student diverged.
    """
    return [_student(catalogue, config, reference, at) for config in configs]


def train_along(task: EncodedTask, order: Order, at: Workspace) -> None:
    """Train a student with the first process of a launch, which keeps it."""
    train_student(_job(task, order, at))


def _student(catalogue: Catalogue, config: StudentConfig, reference: Reference | None, at: Workspace) -> StudentRecord:
    """One student, from its folder or trained."""
    task = catalogue.task
    seed = task.config.seed if config.seed is None else config.seed
    pool = with_own_answers(task, config, build_pool(catalogue, config, seed), at)
    anchor = reference if config.loss.anchor == "original" else None
    teacher = load_teacher(catalogue, config)
    start = None if config.start is None else task.inputs.base_dir / config.start
    more = [*(teacher.identity() if teacher else []), *([weights_of(start)] if start else [])]
    key = student_key(task, config, pool, seed, anchor, more)
    folder = at.directory / "students" / config.name
    stage, *work = student_paths(config.name)
    at.directory.begin(stage, key, stage, *work)
    record = read_student_record(folder) if folder.is_dir() else None
    if record is not None and record.key == key and _is_whole(folder, record):
        at.say(f"student {config.name}: trained already")
        shutil.rmtree(at.directory / ".training" / config.name, ignore_errors=True)
        return record
    order = Order(config, pool, seed, key, anchor, teacher.context if teacher else None, start)
    with at.directory.ledger(stage) as entry:
        entry.processes = LAUNCH.count
        with LAUNCH.in_step(train_along, task, order, at):
            trained = _train(task, order, teacher, at)
        entry.steps, entry.tokens_in, entry.gold_tokens = trained.steps, trained.tokens, trained.gold_tokens
        if trained.resumed:
            entry.resumed_from = trained.resumed
        save_student(trained.student, folder, task.base, record_of(task, order, trained))
    shutil.rmtree(at.directory / ".training" / config.name, ignore_errors=True)
    del trained
    gc.collect()  # a trainer refers to itself: without this, students pile up in memory until some later collection
    written = read_student_record(folder)
    assert written is not None
    return written


def student_paths(name: str) -> tuple[str, str, str]:
    """Where a student, its checkpoints and its logs are in a run directory; the first is its stage, too."""
    return f"students/{name}", f".training/{name}", f"logs/{name}"


def _is_whole(folder: Path, record: StudentRecord) -> bool:
    try:
        return weights_of(folder) == record.weights_sha256
    except InputError:
        return False


def _train(task: EncodedTask, order: Order, teacher: Teacher | None, at: Workspace) -> Trained:
    job = _job(task, order, at, teacher)
    name, steps = order.config.name, job.plan.steps
    dropped = f", {counted(order.pool.dropped, 'row')} too long" if order.pool.dropped else ""
    contexts = ", ".join(item.name for item in order.pool.contexts)
    size = f"{counted(steps, 'step')} of {counted(order.config.batch_size, 'row')}"
    if (note := untracked(order.config)) is not None:
        at.say(note)
    with at.progress.bar(name, steps, "step", f"student {name}: {size} under {contexts}{dropped}") as bar:
        show = step_reporter(bar, held_out="held-out NLL")
        job.report = lambda step, loss, held_out: show(step, None, held_out)  # the loss of a few rows is noise
        return train_student(job)


def _job(task: EncodedTask, order: Order, at: Workspace, teacher: Teacher | None = None) -> Job:
    name = order.config.name
    if teacher is None and order.teacher is not None:
        teacher = load_teacher(Catalogue(task, say=at.say), order.config, order.teacher)
    folder: Path = at.directory / ".training" / name
    logs: Path = at.directory / "logs" / name
    job = Job(task.base, order.config, order.pool, order.seed, order.key, folder, logs, order.reference)
    job.teacher, job.start, job.held_out = teacher, order.start, held_out_of(task, order.pool)
    return job


def held_out_of(task: EncodedTask, pool: Pool) -> HeldOut:
    """The first selection rows under the original, or where a student is not trained under it, under its first
    context.
    """
    contexts = [item.context for item in pool.contexts]
    context: Context = next((context for context in contexts if context.name == "original"), contexts[0])
    if isinstance(context, TextContext):  # encoded for the training rows
        original = context.name == "original"
        context = task.original if original else task.text_context(context.name, context.template)
    rows = task.rows_for(context, "selection")
    return HeldOut(context, replace(rows, rows=rows.rows[:HELD_OUT_ROWS]))


def student_key(
    task: EncodedTask,
    config: StudentConfig,
    pool: Pool,
    seed: int,
    reference: Reference | None,
    more: Sequence[Any] = (),
) -> str:
    """Identity of all that a student depends on: base, contexts, rows, settings, seed, and ``more``: teacher, start."""
    settings = config.model_dump(mode="json", exclude=UNRELATED)
    anchor = reference.key if reference else None
    return key_of(
        TRAINING_VERSION, [settings, pool.sha256(), task.base.identity, str(task.base.dtype), seed, anchor, *more]
    )


def record_of(task: EncodedTask, order: Order, trained: Trained) -> StudentFacts:
    """What ``kvopt-student.json`` says beside the identity of base and weights."""
    return StudentFacts(
        key=order.key,
        template_sha256=task.template.sha256,
        data_sha256=task.dataset.sha256,
        contexts=order.pool.facts(),
        rows=order.pool.rows,
        rows_dropped=order.pool.dropped,
        rows_of_own_answers=order.pool.own,
        seed=order.seed,
        settings=order.config.model_dump(mode="json", exclude={"name", "contexts"}),
        steps=trained.steps,
        epochs=trained.history[-1]["epoch"] if trained.history else 0.0,
        tokens=trained.tokens,
        gold_tokens=trained.gold_tokens,
        stages=[PoolScoring.model_validate(stage) for stage in trained.stages],
        history=[TrainingPoint.model_validate(point) for point in trained.history],
        held_out=[HeldOutPoint.model_validate(point) for point in trained.held_out],
    )
