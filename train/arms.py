"""The arms of a study: every student of the grid as a config of its own.

``students/ARM--seed-0/`` holds one of them. An arm of the curve that is another arm under a new name (n = 0 is the
original alone) is trained once and counts as both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvopt.config.document import Config
from kvopt.config.names import SUFFIX
from kvopt.config.students import ContextChoice, StudentConfig
from kvopt.config.study import CurveConfig, StudyConfig
from kvopt.errors import InputError

EQUAL_SECONDS = "seconds"


@dataclass(frozen=True)
class Arm:
    """One line of the table.

    Attributes:
        name: the student's, or ``curve-N``.
        budget: what makes it equal to the others: steps, tokens, epochs or seconds.
        config: the student's settings; name and seed are replaced for each run.
        mutations: n of the curve, where the arm is one of its points.
    """

    name: str
    budget: str
    config: StudentConfig
    mutations: int | None = None

    def student(self, seed: int, steps: int | None = None) -> StudentConfig:
        """The student of one seed; ``steps`` replaces the budget (equal seconds)."""
        middle = f"--{EQUAL_SECONDS}" if self.budget == EQUAL_SECONDS else ""
        changes: dict[str, Any] = {"name": f"{self.name}{middle}--seed-{seed}", "seed": seed}
        if steps is not None:
            changes |= {"steps": steps, "tokens": None, "epochs": None}
        return self.config.model_copy(update=changes)


def study_arms(config: Config) -> list[Arm]:
    """Arms at equal steps (or tokens, or epochs), then those at equal seconds. Raises InputError."""
    study = settings_of(config)
    arms = [Arm(student.name, study.budget, _with_budget(student, study)) for student in _chosen(config, study)]
    reference = reference_of(config)
    _check_equal(arms, study)
    if study.curve is not None:
        arms = _with_curve(arms, study.curve, reference)
    known = {arm.name: arm for arm in arms}
    for name in study.equal_seconds:
        if name not in known:
            raise _unknown(name, known, "study.equal_seconds")
    arms += [replace(known[name], budget=EQUAL_SECONDS, mutations=None) for name in study.equal_seconds]
    _check_names(config, arms, study)
    return arms


def _check_names(config: Config, arms: Sequence[Arm], study: StudyConfig) -> None:
    """Refuse students that would be trained into one folder, such as a student ``curve-1`` beside that of the curve."""
    taken = {student.name for student in config.students}
    for name in (arm.student(seed).name for arm in arms for seed in study.seeds):
        if name in taken:
            what = f"two students of the study would be named {name!r}"
            raise InputError(what, where="study", fix="name the student or arm otherwise, or give it once")
        taken.add(name)


def settings_of(config: Config) -> StudyConfig:
    """The ``study`` section. Raises InputError where there is none, or no student."""
    if config.study is None:
        raise InputError("the config has no study section", where="study", fix="add study: {seeds: [0, 1, 2]}")
    if not config.students:
        raise InputError("the config has no students to compare", where="students", fix="each of them is an arm")
    return config.study


def reference_of(config: Config) -> str:
    """Name of the arm that others are compared with. Raises InputError for one that does not exist."""
    study = settings_of(config)
    names = [student.name for student in _chosen(config, study)]
    if study.reference is not None and study.reference not in names:
        raise _unknown(study.reference, names, "study.reference")
    return study.reference or names[0]


def trained_students(config: Config) -> list[StudentConfig]:
    """Every student that the config trains by ``kvopt train`` or ``kvopt study``."""
    if config.study is None or not config.students:
        return list(config.students)
    return [*config.students, *(arm.student(seed) for arm in study_arms(config) for seed in config.study.seeds)]


def _chosen(config: Config, study: StudyConfig) -> list[StudentConfig]:
    known = {student.name: student for student in config.students}
    for name in study.arms or ():
        if name not in known:
            raise _unknown(name, known, "study.arms")
    return [known[name] for name in study.arms or known]


def _unknown(name: str, known: Any, where: str) -> InputError:
    return InputError(f"no arm {name!r}", where=where, fix="known: " + ", ".join(known))


def _with_budget(student: StudentConfig, study: StudyConfig) -> StudentConfig:
    if study.amount is None:
        return student
    if study.budget != "epochs" and study.amount != int(study.amount):
        raise InputError(f"{study.amount} {study.budget} is not a whole number", where="study.amount")
    amount = study.amount if study.budget == "epochs" else int(study.amount)
    budget = dict.fromkeys(("steps", "tokens", "epochs")) | {study.budget: amount}
    return StudentConfig.model_validate(student.model_dump() | budget)


def _check_equal(arms: Sequence[Arm], study: StudyConfig) -> None:
    amounts = {arm.name: getattr(arm.config, study.budget) for arm in arms}
    if study.budget == "epochs":  # no budget at all is one epoch
        unset = {a.name for a in arms if (a.config.steps, a.config.tokens, a.config.epochs) == (None,) * 3}
        amounts |= dict.fromkeys(unset, 1)
    if None in amounts.values() or len(set(amounts.values())) > 1:
        amounts_text = ", ".join(f"{name}: {amount or 'none'}" for name, amount in amounts.items())
        what = f"the arms do not have equal {study.budget} ({amounts_text})"
        raise InputError(what, where="study.budget", fix="set study.amount, or the same in every student")


def _with_curve(arms: list[Arm], curve: CurveConfig, reference: str) -> list[Arm]:
    """The arms, those of the curve marked or added."""
    like = curve.like or reference
    pattern = next((arm for arm in arms if arm.name == like), None)
    if pattern is None:
        raise _unknown(like, [arm.name for arm in arms], "study.curve.like")
    arms = list(arms)
    for count in curve.counts:
        contexts = [ContextChoice(context="original")]
        contexts += [ContextChoice(context=f"{curve.context_order}{SUFFIX}:{count}")] if count else []
        config = pattern.config.model_copy(update={"name": f"curve-{count}", "contexts": contexts})
        same = next((i for i, arm in enumerate(arms) if _settings(arm.config) == _settings(config)), None)
        if same is None:
            arms.append(Arm(config.name, pattern.budget, config, count))
        else:
            arms[same] = replace(arms[same], mutations=count)
    return arms


def _settings(config: StudentConfig) -> dict[str, Any]:
    return config.model_dump(exclude={"name"})
