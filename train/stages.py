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

from kvopt.errors import InputError
from kvopt.files import sha256_json
from kvopt.reference import Reference
from kvopt.run import Run
from kvopt.train.config import StudentConfig
from kvopt.train.distill.own_answers import check_own_answers, with_own_answers
from kvopt.train.distill.teacher import Teacher, check_teacher, load_teacher
from kvopt.train.launch import Launch
from kvopt.train.losses import build_loss
from kvopt.train.pool import Pool, PoolContext, build_pool, check_choices
from kvopt.train.student import read_student_record, save_student, weights_of
from kvopt.train.trainer import Job, Trained, train_student

UNRELATED = {
    "name", "contexts", "start", "accumulation", "gradient_checkpointing", "checkpoint_every", "log_every", "report_to"
}  # fmt: skip
"""Settings that do not change what a student becomes, but for rounding (contexts and start count by their content)."""


@dataclass(frozen=True)
class _Order:
    """What the first process sends to the others."""

    config: StudentConfig
    pool: Pool
    seed: int
    key: str
    reference: Reference | None
    teacher: PoolContext | None = None
    start: Path | None = None


def train_students(run: Run, only: Sequence[str] = ()) -> list[dict[str, Any]] | None:
    """Train the config's students (or those in ``only``) in order; returns the record of each.

    Under ``accelerate launch`` every process calls it; only the first locks and writes the run directory, and the
    others return None.

    Raises:
        InputError: an unknown student or context, settings that do not fit. KvoptError: a student diverged.
    """
    configs = chosen(run, only)
    if not configs:
        raise InputError("the config has none", where="students", mend="kvopt config prints an example")
    launch = Launch(run.config.model.device)
    if launch.is_first:
        with run.opened():
            records = students(run, configs, launch)
        launch.share(None)
        return records
    run.say = lambda line: None  # the first process speaks for all
    while (order := launch.share()) is not None:
        train_student(_job(run, order))
    return None


def students(run: Run, configs: Sequence[StudentConfig], launch: Launch | None = None) -> list[dict[str, Any]]:
    """As :func:`train_students`, in a run that is open; ``configs`` from :func:`chosen`."""
    launch = launch or Launch(run.config.model.device)
    return [_student(run, config, launch) for config in configs]


def chosen(run: Run, only: Sequence[str] = ()) -> list[StudentConfig]:
    """The students to train, checked. Raises InputError."""
    known = {student.name: student for student in run.config.students}
    for name in only:
        if name not in known:
            raise InputError(f"no student {name!r} in the config", mend="known: " + (", ".join(known) or "none"))
    configs = [student for student in run.config.students if not only or student.name in only]
    for config in configs:
        check_student(run, config)
    return configs


def check_student(run: Run, config: StudentConfig) -> None:
    """Refuse, before any work, contexts, a teacher, checks or a start that cannot be. Raises InputError."""
    check_choices(run, config)
    check_teacher(run, config)
    check_own_answers(run, config)
    if config.start is not None:
        weights_of(run.base_dir / config.start)


def _student(run: Run, config: StudentConfig, launch: Launch) -> dict[str, Any]:
    """One student, from its folder or trained."""
    seed = run.config.seed if config.seed is None else config.seed
    pool = with_own_answers(run, config, build_pool(run, config))
    reference = run.reference if build_loss(config.loss).anchor == "original" else None
    teacher = load_teacher(run, config)
    start = None if config.start is None else run.base_dir / config.start
    more = [*(teacher.identity() if teacher else []), *([weights_of(start)] if start else [])]
    key = student_key(run, config, pool, seed, reference, more)
    folder = run.directory / "students" / config.name
    record = read_student_record(folder) if folder.is_dir() else None
    if record is not None and record.get("key") == key and _is_whole(folder, record):
        run.say(f"student {config.name}: as it was trained")
        return record
    stage = f"students/{config.name}"
    run.directory.begin(stage, key, stage, f".training/{config.name}", f"logs/{config.name}")
    unread = replace(reference) if reference else None  # open files cannot be sent
    order = launch.share(_Order(config, pool, seed, key, unread, teacher.context if teacher else None, start))
    with run.directory.ledger(stage, processes=launch.processes) as entry:
        trained = _train(run, order, teacher)
        entry |= {"steps": trained.steps, "tokens_in": trained.tokens, "gold_tokens": trained.gold_tokens}
        entry |= {"resumed_from": trained.resumed} if trained.resumed else {}
        save_student(trained.student, folder, run.base, record_of(run, order, trained))
    shutil.rmtree(run.directory / ".training" / config.name, ignore_errors=True)
    del trained
    gc.collect()  # a trainer refers to itself: without this, students pile up in memory until some later collection
    return read_student_record(folder) or {}


def _is_whole(folder: Path, record: dict[str, Any]) -> bool:
    try:
        return weights_of(folder) == record.get("weights_sha256")
    except InputError:
        return False


def _train(run: Run, order: _Order, teacher: Teacher | None) -> Trained:
    job = _job(run, order, teacher)
    name, steps = order.config.name, job.plan.steps
    dropped = f", {order.pool.dropped} rows too long" if order.pool.dropped else ""
    contexts = ", ".join(item.name for item in order.pool.contexts)
    run.say(f"student {name}: {steps} steps of {order.config.batch_size} rows under {contexts}{dropped}")
    with run.progress.bar(name, steps, unit="step") as bar:

        def report(step: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.4f}")
            bar.update(step - bar.n)

        job.report = report
        return train_student(job)


def _job(run: Run, order: _Order, teacher: Teacher | None = None) -> Job:
    name = order.config.name
    teacher = teacher or load_teacher(run, order.config, order.teacher)
    folder: Path = run.directory / ".training" / name
    logs: Path = run.directory / "logs" / name
    job = Job(run.base, order.config, order.pool, order.seed, order.key, folder, logs, order.reference)
    job.teacher, job.start = teacher, order.start
    return job


def student_key(
    run: Run, config: StudentConfig, pool: Pool, seed: int, reference: Reference | None, more: Sequence[Any] = ()
) -> str:
    """Identity of all that a student depends on: base, contexts, rows, settings, seed, and ``more``: teacher, start."""
    settings = config.model_dump(mode="json", exclude=UNRELATED)
    anchor = reference.key if reference else None
    return sha256_json([settings, pool.sha256(), run.base.identity, str(run.base.dtype), seed, anchor, *more])


def record_of(run: Run, order: _Order, trained: Trained) -> dict[str, Any]:
    """What ``kvopt-student.json`` says beside the identity of base and weights."""
    return {
        "key": order.key,
        "template_sha256": run.template.sha256,
        "data_sha256": run.dataset.sha256,
        "contexts": order.pool.facts(),
        "rows": order.pool.rows,
        "rows_dropped": order.pool.dropped,
        "rows_of_own_answers": order.pool.own,
        "seed": order.seed,
        "settings": order.config.model_dump(mode="json", exclude={"name", "contexts"}),
        "steps": trained.steps,
        "epochs": trained.history[-1]["epoch"] if trained.history else 0.0,
        "tokens": trained.tokens,
        "gold_tokens": trained.gold_tokens,
        "stages": trained.stages,
        "history": trained.history,
    }
