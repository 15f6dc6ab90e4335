"""The contexts that a student is trained under, with the training rows in front of which each stands.

Text contexts are prompts: their ids stand in front of the body in the student's own forward pass. Soft contexts are
embeddings that the student prefills, KV contexts a prefix that is the same whatever the student is; both stay as they
are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from kvopt.contexts import Context, NoContext, TextContext, load_context
from kvopt.encoding import Encoded, Row, SeamError
from kvopt.errors import InputError
from kvopt.files import sha256_json
from kvopt.run import Run
from kvopt.select import ORDERS, SUFFIX, first_mutations, split_count
from kvopt.textfile import template_from_file
from kvopt.train.config import ContextChoice, StudentConfig


@dataclass(frozen=True)
class PoolContext:
    """One context of the pool.

    Attributes:
        context: the context; a text context is encoded for the training rows.
        weight: how often rows meet it, relative to the others.
        encoded: the training rows behind the context, the same examples in the same order under every context of a
            pool; ``prefix`` is empty for soft and KV contexts.
    """

    context: Context
    weight: float
    encoded: Encoded

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The rows as the student's forward pass takes them: whole prompts under a text context, bodies behind soft
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

    def facts(self) -> list[dict[str, object]]:
        """What a student folder says about its contexts."""
        return [
            {
                "name": item.name,
                "kind": item.context.kind,
                "tokens": item.context.tokens,
                "weight": item.weight,
                "sha256": item.context.sha256(),
            }
            for item in self.contexts
        ]

    def sha256(self) -> str:
        """Identity of contexts, weights and rows."""
        rows = [[(row.example_id, row.body, row.gold) for row in item.rows] for item in self.contexts]
        return sha256_json([self.facts(), rows])


def build_pool(run: Run, config: StudentConfig) -> Pool:
    """The contexts of ``config``; mutations and learned contexts that are not there yet are made by the run.

    Raises:
        InputError: a context that does not exist or stands twice, too few mutations, a row that is too long (or all of
            them), gold ids that change under a text.
    """
    where = f"students.{config.name}.contexts"
    chosen: list[tuple[Context, float]] = []
    for choice in config.contexts:
        taken = {context.name for context, _ in chosen}
        for context in resolve(run, choice, config.seed if config.seed is not None else run.config.seed, taken, where):
            if context.name in taken:
                raise InputError(f"{context.name!r} stands twice", where=where, mend="give it once, with a weight")
            taken.add(context.name)
            chosen.append((context, choice.weight))
    contexts = [in_front_of_rows(run, context, weight) for context, weight in chosen]
    return _fitting(contexts, config, run.base.geometry.window)


def check_choices(run: Run, config: StudentConfig) -> None:
    """Refuse, before any work, contexts that cannot be there. Raises InputError."""
    for choice in config.contexts:
        check_choice(run, choice.context, f"students.{config.name}.contexts")


def check_choice(run: Run, spec: str, where: str) -> None:
    """As :func:`check_choices`, for one of them."""
    names = ["original", "none", *(context.name for context in run.config.contexts)]
    kind, _, argument = spec.partition(":")
    if counted := split_count(spec, where):
        if counted[1] > run.config.mutations.count:
            what = f"{spec!r} wants more mutations than mutations.count ({run.config.mutations.count})"
            raise InputError(what, where=where, mend="raise mutations.count")
    elif kind == "text":
        template_from_file(run.base_dir / argument, run.template)
    elif spec not in names and not is_mutation(run, spec):
        _check_folder(run, spec, names, where)


def _check_folder(run: Run, spec: str, names: Sequence[str], where: str) -> None:
    if not (run.base_dir / spec).is_dir():
        counted = ", ".join(f"{order}{SUFFIX}:K" for order in ORDERS)
        mend = f"known: {', '.join(names)}; or {counted}, text:FILE, a context folder"
        raise InputError(f"no context {spec!r}", where=where, mend=mend)


def is_mutation(run: Run, name: str) -> bool:
    """Whether a name has the form of a mutation's, in a run that has mutations."""
    return run.config.mutations.count > 0 and re.fullmatch(r"m\d{3,}", name) is not None


def resolve(run: Run, choice: ContextChoice, seed: int, taken: set[str], where: str) -> Sequence[Context]:
    """The contexts that one entry names; ``seed`` and ``taken`` as in :func:`kvopt.select.first_mutations`."""
    spec = choice.context
    kind, _, argument = spec.partition(":")
    if counted := split_count(spec, where):
        contexts = {context.name: context for context in run.mutation_contexts}
        names = first_mutations(
            *counted,
            {name: context.template for name, context in contexts.items()},
            lambda: [context.name for context, _ in run.ranked_mutations],
            run.template,
            seed=seed,
            taken=taken,
            where=f"{where} {spec}",
        )
        return [contexts[name] for name in names]
    if kind == "text":
        template = template_from_file(run.base_dir / argument, run.template)
        return [run.text_context(Path(argument).stem, template)]
    if spec in {context.name for context in run.config.contexts}:
        return run.learned([spec])
    if spec in ("original", "none"):
        return run.named_context(spec)
    if is_mutation(run, spec):
        found = [mutation for mutation in run.mutation_contexts if mutation.name == spec]
        if not found:
            raise InputError(f"no accepted mutation {spec!r}", where=where, mend="see mutations.jsonl for names")
        return found
    return [load_context(run.base_dir / spec, run.base)]


def in_front_of_rows(run: Run, context: Context, weight: float) -> PoolContext:
    """A context with the training rows behind it."""
    if isinstance(context, TextContext):
        try:
            context = run.for_training(context)
        except SeamError as error:
            where = f"{context.name}, {error.where}"
            raise InputError(error.what, where=where, mend="leave this context out") from None
        return PoolContext(context, weight, context.encoded)
    prefix = tuple(context.bos) if isinstance(context, NoContext) else ()
    return PoolContext(context, weight, Encoded(prefix, run.behind("train").rows))


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
    what = f"{over} of {count} rows have more than {limit} tokens with a context, the longest {longest[worst]}"
    where = f"students.{config.name}: {contexts[0].rows[worst].example_id}"
    if config.too_long == "error" or not kept:
        mend = "raise max_length, or set too_long: drop" if kept else "raise max_length"
        raise InputError(what, where=where, mend=mend)
    ids = [contexts[0].rows[i].example_id for i in kept]
    fitting = tuple(replace(item, encoded=item.encoded.select(ids)) for item in contexts)
    return Pool(fitting, count - len(kept))
