"""The teacher of on-policy distillation: the base, or a larger model with its tokenizer, behind its own context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvopt.attention import Prefix, gold_hidden
from kvopt.contexts import Context, load_context
from kvopt.encoding import Row, make_batch
from kvopt.errors import InputError
from kvopt.identity import tokenizer_sha256
from kvopt.model import Base, ModelConfig, load_base, load_tokenizer
from kvopt.run import Run
from kvopt.select import split_count
from kvopt.train.config import ContextChoice, OnPolicyConfig, StudentConfig
from kvopt.train.pool import PoolContext, check_choice, in_front_of_rows, resolve


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


def on_policy(config: StudentConfig) -> OnPolicyConfig | None:
    """The student's on-policy settings, None for another loss."""
    return config.loss if isinstance(config.loss, OnPolicyConfig) else None


def check_teacher(run: Run, config: StudentConfig) -> None:
    """Refuse, before any work, a teacher with another tokenizer or an impossible context. Raises InputError."""
    settings = on_policy(config)
    if settings is None:
        return
    where = _where(config)
    if split_count(settings.teacher.context, f"{where}.context"):
        raise InputError("a teacher sees one context", where=f"{where}.context", mend="name one mutation, such as m001")
    check_choice(run, settings.teacher.context, f"{where}.context")
    if settings.teacher.base is not None:
        if settings.teacher.context in {context.name for context in run.config.contexts}:
            what = (
                f"{settings.teacher.context!r} is learned for {run.base.name!r} and not for {settings.teacher.base!r}"
            )
            mend = "give the teacher a text, or the folder of a context that was learned for it"
            raise InputError(what, where=f"{where}.context", mend=mend)
        try:
            tokenizer, _ = load_tokenizer(_model(run, settings.teacher.base))
        except InputError as error:
            raise InputError(error.what, where=f"{where}.base {settings.teacher.base}", mend=error.mend) from None
        if tokenizer_sha256(tokenizer) != run.base.identity["tokenizer"]:
            what = (
                f"the teacher {settings.teacher.base!r} and the student's base {run.base.name!r} have different"
                " tokenizers, so their distributions cannot be compared token by token"
            )
            raise InputError(what, where=f"{where}.base", mend="choose a teacher of the same family")


def load_teacher(run: Run, config: StudentConfig, context: PoolContext | None = None) -> Teacher | None:
    """The teacher of a student, None for a loss without one.

    Args:
        context: the teacher's context where it is known already; default: made or learned by the run.

    Raises:
        InputError: the context was made for another base, or prompts and answers do not fit the teacher's window.
    """
    settings = on_policy(config)
    if settings is None:
        return None
    name, where = settings.teacher.base, _where(config)
    base = run.base if name is None else load_base(_model(run, name), say=run.say)
    if context is None:
        context = in_front_of_rows(run, _context(run, base, settings, where), 1.0)
    teacher = Teacher(base, context, run.answer_ends)
    window = base.geometry.window
    if teacher.longest() + settings.max_new_tokens > window:
        what = (
            f"prompts of {teacher.longest()} tokens and {settings.max_new_tokens} new ones do not fit {window} tokens"
        )
        raise InputError(what, where=where, mend="lower loss.max_new_tokens")
    return teacher


def _context(run: Run, base: Base, settings: OnPolicyConfig, where: str) -> Context:
    spec = settings.teacher.context
    if base is not run.base and (run.base_dir / spec).is_dir():
        return load_context(run.base_dir / spec, base)
    [found] = resolve(run, ContextChoice(context=spec), run.config.seed, set(), f"{where}.context")
    return found


def _model(run: Run, name: str) -> ModelConfig:
    """The teacher runs as the base does; a path is relative to the config file."""
    place = run.base_dir / name
    return run.config.model.model_copy(
        update={
            "base": str(place.resolve()) if place.exists() else name,
            "revision": None,
            "gradient_checkpointing": False,
        }
    )


def _where(config: StudentConfig) -> str:
    return f"students.{config.name}.loss.teacher"
