"""One student's training as a job: what it stands on, how long it lasts, what it meets when, and what comes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvopt.base.loading import Base
from kvopt.config.students import StudentConfig
from kvopt.measure.reference import Reference
from kvopt.train.distill.teacher import Teacher
from kvopt.train.gold import HeldOut
from kvopt.train.pool import Pool
from kvopt.train.stream import Stream
from kvopt.train.student import Student


@dataclass(frozen=True)
class TrainingPlan:
    """How long a student is trained and what it meets when.

    Attributes:
        stream: rows and contexts under the schedule.
        pool: what they are.
        steps: optimizer steps.
        batch_size: items a step.
    """

    stream: Stream
    pool: Pool
    steps: int
    batch_size: int

    def items(self, positions: Sequence[int], kept: tuple[int, ...]) -> list[tuple[int, int]]:
        """(row, context) at each position of the stream."""
        return [(self.stream.row(p), self.stream.context(p, kept)) for p in positions]

    def step_items(self, step: int, kept: tuple[int, ...]) -> list[tuple[int, int]]:
        """All items of a step (from 0)."""
        return self.items(range(step * self.batch_size, (step + 1) * self.batch_size), kept)

    def epoch(self, step: int) -> float:
        """Passes over the rows before a step."""
        return step * self.batch_size / self.stream.per_epoch


def make_plan(config: StudentConfig, pool: Pool, seed: int) -> TrainingPlan:
    """The plan of a config: ``steps`` as given, or as many as the epochs or tokens take, up to a whole step."""
    stream = Stream(config.schedule, pool.rows, tuple(pool.weights), seed, config.batch_size)
    if config.steps is not None:
        steps = config.steps
    elif config.tokens is not None:
        steps, seen = 0, 0
        endless = TrainingPlan(stream, pool, 0, config.batch_size)
        while seen < config.tokens:
            seen += sum(pool.tokens(*item) for item in endless.step_items(steps, ()))
            steps += 1
    else:
        steps = math.ceil((config.epochs or 1) * stream.per_epoch / config.batch_size - 1e-9)
    return TrainingPlan(stream, pool, steps, config.batch_size)


@dataclass
class Trained:
    """A trained student and how it got there.

    Attributes:
        student: its model, trained.
        steps: optimizer steps, all of them. resumed: those that an earlier process had done.
        tokens: through the student (see ``Pool.tokens``). gold_tokens: that the loss was computed on.
        history: ``{"step", "epoch", "loss", "grad_norm", "learning_rate"}`` every ``log_every`` steps; the loss is the
            mean per gold token since the last entry.
        stages: ``{"step", "gold_nll", "kept"}`` at every scoring of the pool (state-adaptive).
        held_out: ``{"step", "gold_nll"}`` at every measurement on held-out rows.
    """

    student: Student
    steps: int
    resumed: int
    tokens: int
    gold_tokens: int
    history: list[dict[str, Any]]
    stages: list[dict[str, Any]]
    held_out: list[dict[str, Any]]


@dataclass
class Job:
    """What one student's training stands on.

    Args:
        key: identity of the job; checkpoints of another are not taken up.
        folder: where checkpoints go.
        logs: where TensorBoard events go.
        report: called at the first step of this process and after each step with (step, loss where it was just logged,
            held-out NLL where it was just measured).
        teacher: for on-policy distillation.
        start: a student folder to go on from.
        held_out: what the student is measured on now and then.
    """

    base: Base
    config: StudentConfig
    pool: Pool
    seed: int
    key: str
    folder: Path
    logs: Path
    reference: Reference | None = None
    report: Callable[[int, float | None, float | None], None] | None = None
    teacher: Teacher | None = None
    start: Path | None = None
    held_out: HeldOut | None = None
    plan: TrainingPlan = field(init=False)

    def __post_init__(self) -> None:
        self.plan = make_plan(self.config, self.pool, self.seed)
