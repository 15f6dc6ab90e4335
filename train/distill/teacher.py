"""The teacher of on-policy distillation: the base, or a larger model with its tokenizer, after its own context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvopt.base.identity import tokenizer_sha256
from kvopt.base.loading import Base, load_base, load_tokenizer
from kvopt.base.prefix import Prefix, gold_hidden
from kvopt.config.model import ModelConfig
from kvopt.config.names import ContextName
from kvopt.config.students import StudentConfig
from kvopt.contexts import Context, load_context
from kvopt.errors import InputError
from kvopt.run.catalogue import Catalogue
from kvopt.run.inputs import Inputs
from kvopt.task.seam import Row, make_batch
from kvopt.train.losses.on_policy import OnPolicyDivergence
from kvopt.train.pool import PoolContext, check_choice, in_front_of_rows


@dataclass(frozen=True)
class Teacher:
    """Who scores the student's answers.

    Attributes:
        base: a frozen model with the student's tokenizer.
        context: what it sees, in front of the training rows.
        ends: ids that end an answer.
    """

    base: Base
    context: PoolContext
    ends: frozenset[int] = field(default_factory=frozenset)

    @cached_property
    def _rows(self) -> dict[str, Row]:
        return {row.example_id: row for row in self.context.encoded.rows}

    @cached_property
    def _prefix(self) -> Prefix:
        return self.context.context.prefix(self.base)

    @torch.no_grad()
    def hidden(self, answered: Sequence[Row]) -> Tensor:
        """[G, D_t]: the teacher's states at the positions that predict the answers, row by row. ``answered`` are the
        student's rows with their answers as gold; only example and answer are taken from them.
        """
        rows = [replace(self._rows[row.example_id], gold=row.gold) for row in answered]
        batch = make_batch(rows, range(len(rows))).to(self.base.device)
        return gold_hidden(self.base, self._prefix, batch)

    def longest(self) -> int:
        """Tokens of the longest prompt that it sees, prefix included."""
        return len(self._prefix) + max(len(row.body) for row in self._rows.values())

    def identity(self) -> list[Any]:
        """What a student that it taught depends on."""
        rows = [(row.example_id, row.body) for row in self.context.encoded.rows]
        return [self.base.identity, str(self.base.dtype), self.context.context.sha256(), rows]


def on_policy(config: StudentConfig) -> OnPolicyDivergence | None:
    """The student's on-policy settings, None for another loss."""
    return config.loss if isinstance(config.loss, OnPolicyDivergence) else None


def check_teacher(inputs: Inputs, config: StudentConfig) -> None:
    """Refuse, before any work, a teacher with another tokenizer or an impossible context. Raises InputError."""
    settings = on_policy(config)
    if settings is None:
        return
    where, seen = _where(config), settings.teacher.context
    if ContextName.parse(seen, f"{where}.context").form == "counted":
        raise InputError("a teacher sees one context", where=f"{where}.context", fix="name one mutation, such as m001")
    check_choice(inputs, seen, f"{where}.context")
    if settings.teacher.base is None:
        return
    student = inputs.config.model
    if seen in inputs.context_names:
        what = f"{seen!r} is learned for {student.base!r} and not for {settings.teacher.base!r}"
        fix = "give the teacher a text, or the folder of a context that was learned for it"
        raise InputError(what, where=f"{where}.context", fix=fix)
    try:
        tokenizer, _ = load_tokenizer(_model(inputs, settings.teacher.base))
    except InputError as error:
        raise InputError(error.what, where=f"{where}.base {settings.teacher.base}", fix=error.fix) from None
    if tokenizer_sha256(tokenizer) != tokenizer_sha256(load_tokenizer(student)[0]):
        what = (
            f"the teacher {settings.teacher.base!r} and the student's base {student.base!r} have different"
            " tokenizers, so their distributions cannot be compared token by token"
        )
        raise InputError(what, where=f"{where}.base", fix="choose a teacher of the same family")


def teacher_name(inputs: Inputs, config: StudentConfig) -> ContextName | None:
    """The context that the student's teacher sees, where it is one of the run's; None for a loss without a teacher, or
    a folder that was learned for the teacher's own base.
    """
    settings = on_policy(config)
    if settings is None or _is_own_folder(inputs, settings):
        return None
    return ContextName.parse(settings.teacher.context, f"{_where(config)}.context")


def load_teacher(catalogue: Catalogue, config: StudentConfig, context: PoolContext | None = None) -> Teacher | None:
    """The teacher of a student, None for a loss without one.

    Args:
        catalogue: holds :func:`teacher_name`, unless ``context`` is given.
        context: the teacher's context where it is known already.

    Raises:
        InputError: the context was made for another base, or prompts and answers do not fit the teacher's window.
    """
    settings = on_policy(config)
    if settings is None:
        return None
    task, where = catalogue.task, _where(config)
    name = settings.teacher.base
    base = task.base if name is None else load_base(_model(task.inputs, name), say=catalogue.say)
    if context is None:
        context = in_front_of_rows(task, _context(catalogue, base, settings, where), 1.0)
    teacher = Teacher(base, context, task.answer_ends)
    window = base.geometry.window
    if teacher.longest() + settings.max_new_tokens > window:
        what = (
            f"prompts of {teacher.longest()} tokens and {settings.max_new_tokens} new ones do not fit {window} tokens"
        )
        raise InputError(what, where=where, fix="lower loss.max_new_tokens")
    return teacher


def _is_own_folder(inputs: Inputs, settings: OnPolicyDivergence) -> bool:
    return settings.teacher.base is not None and (inputs.base_dir / settings.teacher.context).is_dir()


def _context(catalogue: Catalogue, base: Base, settings: OnPolicyDivergence, where: str) -> Context:
    inputs, spec = catalogue.task.inputs, settings.teacher.context
    if _is_own_folder(inputs, settings):
        return load_context(inputs.base_dir / spec, base)
    name = ContextName.parse(spec, f"{where}.context")
    [context] = catalogue.named(name, f"{where}.context", seed=inputs.config.seed)
    return context


def _model(inputs: Inputs, name: str) -> ModelConfig:
    """The teacher runs as the base does; a path is relative to the config file."""
    place = inputs.base_dir / name
    return inputs.config.model.model_copy(
        update={
            "base": str(place.resolve()) if place.exists() else name,
            "revision": None,
            "gradient_checkpointing": False,
        }
    )


def _where(config: StudentConfig) -> str:
    return f"students.{config.name}.loss.teacher"
