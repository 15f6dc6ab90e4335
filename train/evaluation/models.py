"""The models that an evaluation looks at: the base, and trained students by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kvopt.base.launch import LAUNCH
from kvopt.base.loading import Base
from kvopt.documents.evaluation_file import BASE
from kvopt.documents.student_record import StudentRecord
from kvopt.errors import InputError
from kvopt.run.directory import Workspace
from kvopt.run.encoded_task import EncodedTask
from kvopt.train.student import load_student, read_student_record


@dataclass(frozen=True)
class Subject:
    """A model to evaluate; loaded when it is first needed.

    Attributes:
        base: the frozen base, or what the student was trained from.
        name: "base", or the student's.
        folder: where its evaluation goes; a student's own folder.
        record: what a student folder says about itself, None for the base.
    """

    base: Base
    name: str
    folder: Path
    record: StudentRecord | None = None

    @cached_property
    def model(self) -> Base:
        return self.base if self.name == BASE else LAUNCH.everywhere(self._own, load_student, self.folder, self.base)

    def release(self) -> None:
        """Forget the loaded student, so that many can be evaluated one after the other."""
        self.__dict__.pop("model", None)
        LAUNCH.forget(self._own)

    @property
    def _own(self) -> str:
        return f"student {self.folder}"

    @property
    def identity(self) -> dict[str, str | None]:
        """Hashes of the base, and of the student's weights; known without loading it where its record has them."""
        digest = self.record.weights_sha256 if self.record else None
        if self.name == BASE or digest is None:
            return self.model.identity
        return {**self.base.identity, "student": digest}


def subject(task: EncodedTask, name: str, at: Workspace) -> Subject:
    """The base or a trained student by name. Raises InputError for one that is not there."""
    folder = at.directory / "students" / name
    if name == BASE:
        return Subject(task.base, name, folder)
    record = read_student_record(folder)
    if record is None and not (folder / "adapter_config.json").is_file():
        configured = [student.name for student in task.config.students]
        if name in configured:
            raise InputError("is not trained yet", where=f"student {name}", fix="kvopt train trains it")
        fix = "known: " + ", ".join([BASE, *configured])
        raise InputError(f"no student {name!r}", where="--student", fix=fix)
    task.base.check_whole(f"student {name}")
    if record is not None and record.template_sha256 not in (None, task.template.sha256):
        at.say(f"warning: student {name} was trained for another template than the config's")
    return Subject(task.base, name, folder, record)


def subjects(task: EncodedTask, at: Workspace, names: Sequence[str] = ()) -> list[Subject]:
    """The models of these names; without any, the base and every student of the config that is trained."""
    if names:
        return [subject(task, name, at) for name in dict.fromkeys(names)]
    trained = [subject(task, BASE, at)]
    for student in task.config.students:
        try:
            trained.append(subject(task, student.name, at))
        except InputError as error:
            at.say(f"warning: {error}")
    return trained
