"""The tasks of a sequence as runs of their own, ``tasks/NAME/``, over one base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from kvopt.config.document import Config, load_config
from kvopt.config.sequence import SequenceConfig
from kvopt.config.students import StudentConfig
from kvopt.errors import InputError
from kvopt.run.run import Run
from kvopt.train.training import check_student


@dataclass(frozen=True)
class SequenceTask:
    """One task; its run's students are the sequence's arms, each starting from its student of the task before."""

    name: str
    run: Run

    def folder(self, arm: str) -> Path:
        """The student of an arm after this task's stage."""
        return self.run.directory / "students" / arm


def load_tasks(
    config: SequenceConfig,
    base_dir: Path,
    out: Path,
    *,
    say: Callable[[str], None],
    bars: bool | None = None,
    adapt: Callable[[Config], Config] = lambda settings: settings,
) -> list[SequenceTask]:
    """Read every stage's config and data, before anything is worked on.

    Args:
        adapt: what is changed in each of them.

    Raises:
        InputError: a config that is wrong, two tasks of one name, tasks over different bases, contexts that a task
            does not have, a teacher, checks or a start that cannot be.
    """
    tasks: list[SequenceTask] = []
    for number, stage in enumerate(config.stages):
        settings, folder = load_config(base_dir / stage.config, stage.set)
        settings = adapt(settings)
        name = stage.name or settings.name
        where = f"stages.{number} {stage.config}"
        if name in [task.name for task in tasks]:
            raise InputError(f"two tasks are named {name!r}", where=where, fix="give the stage a name of its own")
        if tasks and settings.model != tasks[0].run.config.model:
            what = f"its model section differs from that of {config.stages[0].config}"
            raise InputError(what, where=where, fix="all tasks of a sequence are learned by one model")
        students = [_continued(arm, number, settings.seed, tasks[-1] if tasks else None) for arm in config.arms]
        changes = {"students": students, "study": None, "evaluate": config.evaluate or settings.evaluate}
        run = Run(settings.model_copy(update=changes), folder, out / "tasks" / name, say=say, bars=bars)
        for student in students:
            # a later stage starts from a student that is not there yet
            check_student(run.inputs, student.model_copy(update={"start": None}) if tasks else student)
        tasks.append(SequenceTask(name, run))
    return tasks


def _continued(arm: StudentConfig, number: int, seed: int, before: SequenceTask | None) -> StudentConfig:
    """The arm at a stage: another seed for every stage (orders, halves that are frozen), and where it starts."""
    changes: dict[str, object] = {"seed": (seed if arm.seed is None else arm.seed) + number}
    if before is not None:
        changes["start"] = str(before.folder(arm.name).resolve())
    return arm.model_copy(update=changes)


@contextmanager
def opened(tasks: list[SequenceTask], joined: str | None = None) -> Iterator[None]:
    """All runs open, with one loaded base; or ``joined`` for a piece of work of that name."""
    with ExitStack() as stack:
        for task in tasks:
            task.run.use_base(tasks[0].run.load_base())
            stack.enter_context(task.run.opened() if joined is None else task.run.directory.joined(joined))
        yield
