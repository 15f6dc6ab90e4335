"""The contexts that a student is trained under, with the training rows in front of which each stands.

Text contexts are prompts: their ids stand in front of the body in the student's own forward pass. Soft contexts are
embeddings that the student prefills, KV contexts a prefix that is the same whatever the student is; both stay as they
are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from kvopt.config.names import ContextName, unknown_context
from kvopt.config.students import StudentConfig
from kvopt.contexts import Context, NoContext, TextContext
from kvopt.documents.student_record import TrainingContext
from kvopt.errors import InputError, counted
from kvopt.run.catalogue import Catalogue
from kvopt.run.encoded_task import EncodedTask
from kvopt.run.inputs import Inputs
from kvopt.run.race import check_raced
from kvopt.storage.files import sha256_json
from kvopt.task.seam import Encoded, Row, SeamError
from kvopt.task.template_files import template_from_file

TEXTS = ("original", "none", "counted", "text", "mutations", "mutation")
"""Forms of names that always mean a text."""


@dataclass(frozen=True)
class PoolContext:
    """One context of the pool.

    Attributes:
        context: the context; a text context is encoded for the training rows.
        weight: how often rows meet it, relative to the others.
        encoded: the training rows after the context, the same examples in the same order under every context of a
            pool; ``prefix`` is empty for soft and KV contexts.
    """

    context: Context
    weight: float
    encoded: Encoded

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The rows as the student's forward pass takes them: whole prompts under a text context, bodies after soft
        and KV contexts.
        """
        prefix = self.encoded.prefix
        return tuple(replace(row, body=(*prefix, *row.body)) for row in self.encoded.rows)

    @property
    def name(self) -> str:
        return self.context.name

    @property
    def is_text(self) -> bool:
        return self.context.kind == "text"

    @property
    def slots(self) -> int:
        """Length of the prefix that stands in front of the rows."""
        return 0 if self.is_text else self.context.tokens


@dataclass(frozen=True)
class Pool:
    """The contexts of a student; ``dropped`` counts training rows that were left out because one made them too long,
    ``own`` rows whose gold is the base's own answer.
    """

    contexts: tuple[PoolContext, ...]
    dropped: int = 0
    own: int = 0

    @property
    def rows(self) -> int:
        return len(self.contexts[0].rows)

    @property
    def weights(self) -> tuple[float, ...]:
        return tuple(item.weight for item in self.contexts)

    @cached_property
    def gold_counts(self) -> tuple[int, ...]:
        """Gold tokens of each row, the same under every context."""
        return tuple(len(row.gold) for row in self.contexts[0].rows)

    def tokens(self, row: int, context: int) -> int:
        """Tokens that the row puts through the student under that context: prompt or body, and gold but for its last
        token. Slots of a soft or KV prefix are not counted, a text that rows share is counted for each of them.
        """
        return len(self.contexts[context].rows[row]) - 1

    def facts(self) -> list[TrainingContext]:
        """What a student folder says about its contexts."""
        return [
            TrainingContext(
                name=item.name,
                kind=item.context.kind,
                tokens=item.context.tokens,
                weight=item.weight,
                sha256=item.context.sha256(),
            )
            for item in self.contexts
        ]

    def sha256(self) -> str:
        """Identity of contexts, weights and rows."""
        rows = [[(row.example_id, row.body, row.gold) for row in item.rows] for item in self.contexts]
        return sha256_json([[context.to_json() for context in self.facts()], rows])


def build_pool(catalogue: Catalogue, config: StudentConfig, seed: int) -> Pool:
    """The contexts of ``config``.

    Args:
        catalogue: must hold what :func:`names_of` says.
        seed: of mutations that are taken by chance.

    Raises:
        InputError: a context that does not exist or stands twice, too few mutations, a row that is too long (or all of
            them), gold ids that change under a text.
    """
    where = f"students.{config.name}.contexts"
    chosen: list[tuple[Context, float]] = []
    for choice in config.contexts:
        taken = {context.name for context, _ in chosen}
        name = ContextName.parse(choice.context, where)
        for context in catalogue.named(name, where, seed=seed, taken=taken):
            if context.name in taken:
                raise InputError(f"{context.name!r} is given twice", where=where, fix="give it once, with a weight")
            taken.add(context.name)
            chosen.append((context, choice.weight))
    contexts = [in_front_of_rows(catalogue.task, context, weight) for context, weight in chosen]
    check_dropout(config, any(item.slots for item in contexts))
    return _fitting(contexts, config, catalogue.task.base.geometry.window)


def names_of(config: StudentConfig) -> list[ContextName]:
    """The contexts that a student's section names."""
    return [ContextName.parse(choice.context, f"students.{config.name}.contexts") for choice in config.contexts]


def check_choices(inputs: Inputs, config: StudentConfig) -> None:
    """Refuse, before any work, contexts that cannot be there. Raises InputError."""
    for choice in config.contexts:
        check_choice(inputs, choice.context, f"students.{config.name}.contexts")
    names = names_of(config)
    if config.loss.anchor == "other" and sum(name.count or 1 for name in names) < 2:
        what = f"{config.loss.kind} compares two wordings of a row, and the student has one context"
        raise InputError(what, where=f"students.{config.name}.contexts", fix="give it another, or another loss")
    if all(name.form in TEXTS or name.argument in inputs.written for name in names):
        check_dropout(config, False)


def check_dropout(config: StudentConfig, has_slots: bool) -> None:
    """Refuse ``context_dropout`` where no context has slots. Raises InputError."""
    if config.context_dropout and not has_slots:
        raise InputError(
            "drops slots of soft and KV contexts, and all of the student's are text",
            where=f"students.{config.name}.context_dropout",
            fix="add a learned context to its contexts, or leave context_dropout out",
        )


def check_choice(inputs: Inputs, spec: str, where: str) -> None:
    """As :func:`check_choices`, for one of them."""
    name, count = ContextName.parse(spec, where), inputs.config.mutations.count
    if name.form == "counted" and name.count > count:
        what = f"{spec!r} wants more mutations than mutations.count ({count})"
        raise InputError(what, where=where, fix="raise mutations.count")
    check_raced(inputs.config, name, where)
    if name.form == "text":
        template_from_file(inputs.base_dir / name.argument, inputs.template)
    elif name.form == "of-run" and not (inputs.base_dir / name.run / "manifest.json").is_file():
        raise InputError(f"{name.run} is not a run directory", where=where, fix="write RUN#NAME")
    elif (
        (name.form in ("plain", "context") or (name.form == "mutation" and count == 0))
        and name.argument not in (*inputs.context_names, *inputs.written)
        and not (inputs.base_dir / name.argument).is_dir()
    ):
        known = ["original", "none", *inputs.written, *inputs.context_names]
        raise unknown_context(spec, where, known, ("counted", "text", "plain"))


def in_front_of_rows(task: EncodedTask, context: Context, weight: float) -> PoolContext:
    """The context with the training rows after it. Raises InputError when gold ids change under a text."""
    if isinstance(context, TextContext):
        try:
            context = task.for_training(context)
        except SeamError as error:
            where = f"{context.name}, {error.where}"
            raise InputError(error.what, where=where, fix="leave this context out") from None
        return PoolContext(context, weight, context.encoded)
    prefix = tuple(context.bos) if isinstance(context, NoContext) else ()
    return PoolContext(context, weight, Encoded(prefix, task.bare_rows("train").rows))


def _fitting(contexts: Sequence[PoolContext], config: StudentConfig, window: int) -> Pool:
    """The pool with the rows that fit ``max_length`` under every context. Raises InputError."""
    limit = min(config.max_length or window, window)
    count = len(contexts[0].rows)
    longest = [max(item.slots + len(item.rows[i]) for item in contexts) for i in range(count)]
    kept = [i for i in range(count) if longest[i] <= limit]
    if len(kept) == count:
        return Pool(tuple(contexts))
    worst = max(range(count), key=lambda i: longest[i])
    over = count - len(kept)
    rows = f"{over} of {counted(count, 'row')} {'has' if over == 1 else 'have'}"
    what = f"{rows} more than {limit} tokens with a context, the longest {longest[worst]}"
    where = f"students.{config.name}: {contexts[0].rows[worst].example_id}"
    if config.too_long == "error" or not kept:
        fix = "raise max_length, or set too_long: drop" if kept else "raise max_length"
        raise InputError(what, where=where, fix=fix)
    ids = [contexts[0].rows[i].example_id for i in kept]
    fitting = tuple(replace(item, encoded=item.encoded.select(ids)) for item in contexts)
    return Pool(fitting, count - len(kept))
