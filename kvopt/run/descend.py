"""A learned context of a task: where it starts, and gradient descent from there. Nothing is stored but a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from kvopt.base.prefix import Prefix
from kvopt.config.contexts import ContextConfig
from kvopt.contexts.context import KVContext, SoftContext
from kvopt.contexts.folder import TensorContext
from kvopt.learning.descent import Descent, batch_at, optimize
from kvopt.learning.start_task import StartTask, initial_tensor
from kvopt.measure.moments import StoredMoments
from kvopt.measure.reference import Reference
from kvopt.measure.score import TokenScores
from kvopt.run.encoded_task import EncodedTask

MATCHING_ROWS = 64
"""Training rows whose bodies give the queries of attention matching."""


def seed_of(task: EncodedTask, config: ContextConfig) -> int:
    """The seed of a context: its own, or the task's."""
    return task.config.seed if config.seed is None else config.seed


def slots_of(task: EncodedTask, config: ContextConfig, ids: Sequence[int], source: TensorContext | None) -> int:
    """How many slots a context has that starts from these ids, or from ``source``. Raises InputError where they do not
    fit the window.
    """
    text = config.start.text
    tokens = config.tokens or (source.tokens if source else min(len(ids), text.tokens if text else len(ids)))
    task.check_window(config.name, tokens)
    return tokens


def drawn_ids(task: EncodedTask, config: ContextConfig) -> set[str]:
    """Ids of the training rows that the steps of a context draw."""
    train = [example.id for example in task.dataset.train]
    if config.steps * config.batch_size >= 2 * len(train):
        return set(train)
    steps, seed = range(config.steps), seed_of(task, config)
    return {train[i] for step in steps for i in batch_at(step, len(train), config.batch_size, seed)}


def descend(
    task: EncodedTask,
    config: ContextConfig,
    ids: Sequence[int],
    source: TensorContext | None,
    reference: Reference,
    *,
    moments: StoredMoments | None = None,
    choose: Callable[[Prefix, TokenScores], float] | None = None,
    checkpoint: Path | None = None,
    key: str = "",
    report: Callable[[int, float | None, float | None], None] | None = None,
) -> tuple[TensorContext, Descent]:
    """A soft prompt or KV cache as ``config`` says: the state that is best on the selection rows, and how it got there.

    Args:
        task: the task as one base sees it; its training rows are learned on.
        config: kind, slots, start, steps and so on.
        ids: token ids of the text that it starts from.
        source: the context that it starts from, in place of a text.
        reference: holds the selection rows, and the training rows that are drawn.
        moments, choose, checkpoint, key, report: as :func:`kvopt.learning.descent.optimize` takes them.

    Raises:
        InputError: the slots do not fit. KvoptError: the descent diverged.
    """
    train, held_out, seed = task.bare_rows("train").rows, task.bare_rows("selection").rows, seed_of(task, config)
    tokens = slots_of(task, config, ids, source)
    start = StartTask(task.base, config.name, config.kind, tokens, ids, train[:MATCHING_ROWS], source, seed)
    descent = optimize(
        task.base,
        initial_tensor(config.start.start, start),
        config,
        train,
        held_out,
        reference,
        moments=moments,
        seed=seed,
        choose=choose,
        checkpoint=checkpoint,
        key=key,
        report=report,
    )
    made = KVContext if config.kind == "kv" else SoftContext
    return made(config.name, descent.tensor), descent
