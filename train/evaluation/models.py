"""The models that an evaluation looks at: the base, and trained students by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kvopt.errors import InputError
from kvopt.model import Base
from kvopt.run import Run
from kvopt.train.student import load_student, read_student_record

BASE = "base"


@dataclass(frozen=True)
class Subject:
    """A model to evaluate; loaded when it is first needed.

    Attributes:
        name: "base", or the student's.
        folder: where its evaluation goes; a student's own folder.
        record: what a student folder says about itself, None for the base.
    """

    run: Run
    name: str
    folder: Path
    record: dict[str, Any] | None = None

    @cached_property
    def model(self) -> Base:
        return self.run.base if self.name == BASE else load_student(self.folder, self.run.base)

    def release(self) -> None:
        """Forget the loaded student, so that many can be evaluated one after the other."""
        self.__dict__.pop("model", None)

    @property
    def identity(self) -> dict[str, str | None]:
        """Hashes of the base, and of the student's weights; known without loading it where its record has them."""
        digest = (self.record or {}).get("weights_sha256")
        if self.name == BASE or digest is None:
            return self.model.identity
        return {**self.run.base.identity, "student": digest}


def subject(run: Run, name: str) -> Subject:
    """The base or a trained student by name. Raises InputError for one that is not there."""
    folder = run.directory / "students" / name
    if name == BASE:
        return Subject(run, name, folder)
    record = read_student_record(folder)
    if record is None and not (folder / "adapter_config.json").is_file():
        configured = [student.name for student in run.config.students]
        if name in configured:
            raise InputError("is not trained yet", where=f"student {name}", mend="kvopt train trains it")
        mend = "known: " + ", ".join([BASE, *configured])
        raise InputError(f"no student {name!r}", where="--student", mend=mend)
    if record is not None and record.get("template_sha256") not in (None, run.template.sha256):
        run.say(f"warning: student {name} was trained for another template than the config's")
    return Subject(run, name, folder, record)


def subjects(run: Run, names: Sequence[str] = ()) -> list[Subject]:
    """The models of these names; without any, the base and every student of the config that is trained."""
    if names:
        return [subject(run, name) for name in dict.fromkeys(names)]
    found = [subject(run, BASE)]
    for student in run.config.students:
        try:
            found.append(subject(run, student.name))
        except InputError as error:
            run.say(f"warning: {error}")
    return found
