"""Gradient descent on a context: a soft prompt or a KV cache that makes the frozen base behave as it does under the
template.

The loss is the forward KL per gold token to the stored reference, exact over the whole vocabulary (``kvopt.kernels``).
Masters are fp32; the model sees them in its own dtype. Everything random is a function of the seed and the step, so a
resumed run ends in the same bytes.

Symbols: T slots, F of them frozen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvopt.base.launch import LAUNCH
from kvopt.base.loading import Base
from kvopt.base.prefix import Prefix, gold_hidden, prefill
from kvopt.config.contexts import ContextConfig
from kvopt.errors import InputError, KvoptError, counted
from kvopt.kernels import KLOptions, linear_kl
from kvopt.learning.descent_state import CheckpointKeeper, DescentState
from kvopt.measure.moments import StoredMoments
from kvopt.measure.reference import Reference
from kvopt.measure.score import TokenScores, score_prefix
from kvopt.task.seam import Row, make_batch

DESCENT_VERSION = 1
"""Raise it when the same inputs give another context: other starts, steps, or a choice of the state that is kept."""


@dataclass
class Descent:
    """The best state on held-out rows, and how it got there.

    Attributes:
        tensor: fp32, kv [T, L, 2, H, d] or soft [T, D].
        step: the step that it was measured at (0 = the initial state).
        history: ``{"step", "held_out_kl", "train_kl"}`` at every measurement; train_kl is the mean since the last one
            (None at step 0). With ``choose`` also its value, ``chosen_by``.
        steps: optimizer steps done.
    """

    tensor: Tensor
    step: int
    history: list[dict[str, Any]]
    steps: int


def context_prefix(base: Base, kind: str, tensor: Tensor) -> Prefix:
    """The prefix of a learned tensor, differentiable in it: kv as it is, soft by a prefill."""
    if kind == "kv":
        return Prefix.unstack(tensor, base.dtype)
    return prefill(base, embeddings=tensor.to(base.dtype))


def learning_rate_at(step: int, config: ContextConfig) -> float:
    """Linear warm-up, then a cosine to 0 at the last step (``step`` counts from 0)."""
    warm = round(config.warmup * config.steps)
    if step < warm:
        return config.learning_rate * (step + 1) / (warm + 1)
    progress = (step - warm) / max(1, config.steps - warm)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def batch_at(step: int, rows: int, batch_size: int, seed: int) -> list[int]:
    """Row positions of a step: each epoch is its own permutation, and batches run on over its end."""
    size = min(batch_size, rows)
    chosen = []
    for position in range(step * size, (step + 1) * size):
        epoch, place = divmod(position, rows)
        chosen.append(int(_permutation(epoch, rows, seed)[place]))
    return chosen


def _permutation(epoch: int, rows: int, seed: int) -> Tensor:
    return torch.randperm(rows, generator=torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63))


def check_share(config: ContextConfig, rows: int) -> None:
    """Raises InputError where a batch has no row for one of the processes of this launch."""
    if config.steps and (size := min(config.batch_size, rows)) < LAUNCH.count:
        what = f"a batch of {counted(size, 'row')} leaves some of {LAUNCH.count} processes without one"
        where, fix = f"contexts.{config.name}.batch_size", f"launch at most {size}, or raise it"
        raise InputError(what, where=where, fix=fix)


def optimize(
    base: Base,
    initial: Tensor,
    config: ContextConfig,
    train: Sequence[Row],
    held_out: Sequence[Row],
    reference: Reference,
    *,
    moments: StoredMoments | None = None,
    seed: int = 0,
    choose: Callable[[Prefix, TokenScores], float] | None = None,
    checkpoint: Path | None = None,
    key: str = "",
    report: Callable[[int, float | None, float | None], None] | None = None,
) -> Descent:
    """Minimize forward KL to the reference on ``train``, keep the state that is best on ``held_out``.

    Args:
        base: the frozen model.
        initial: fp32, kv [T, L, 2, H, d] or soft [T, D].
        config: steps, batch size, learning rate and so on.
        train, held_out: rows as encoded under the original template; both must be in the reference.
        reference: stored hidden states.
        moments: the reference's moments of the training rows, to be trained on instead of its hidden states.
        seed: of the order of rows.
        choose: a value of a state, given its prefix and its scores on ``held_out``; the state with the lowest is kept,
            of equal ones that with the lowest KL. Default: the KL itself.
        checkpoint: file to go on from and to write now and then; with ``key`` it is only taken up by the same job.
        report: called with (step, train KL, held-out KL where it was just measured): at once with the step that this
            call begins at, and after each step.

    Raises:
        KvoptError: the loss or the gradient is not finite; the last checkpoint is kept.
        InputError: no gradients come through the base.
    """
    if config.steps:
        base.check_gradients(f"contexts.{config.name}.steps")
    frozen = min(config.frozen, initial.shape[0])
    head = initial[:frozen].detach().to(base.device, copy=True)
    state = checkpoint and DescentState.load(checkpoint, key, config, base.device)
    if not state:
        slots = initial[frozen:].detach().to(base.device, copy=True)
        state = DescentState.begin(slots, initial.detach().to("cpu", copy=True), config)
    del initial
    job = _Job(base, config, head, train, held_out, reference, moments, seed, choose)
    if not state.history:
        _measure(job, state)
    if report:
        report(state.step, None, state.history[-1]["held_out_kl"])
    keeper = CheckpointKeeper(state, checkpoint, key)
    while state.step < config.steps and state.trainable.numel():
        if config.patience is not None and state.since_best >= config.patience:
            break
        with keeper.of_memory():
            loss = _loss_of_step(job, state, keeper)
        _move(job, state, loss)
        measured = state.step % config.eval_every == 0 or state.step == config.steps
        if measured:
            _measure(job, state)
        keeper.now_and_then()
        if report:
            report(state.step, loss, state.history[-1]["held_out_kl"] if measured else None)
    return Descent(state.best, state.best_step, state.history, state.step)


@dataclass(frozen=True)
class _Job:
    base: Base
    config: ContextConfig
    frozen: Tensor
    train: Sequence[Row]
    held_out: Sequence[Row]
    reference: Reference
    moments: StoredMoments | None
    seed: int
    choose: Callable[[Prefix, TokenScores], float] | None


def context_loss(
    base: Base,
    kind: str,
    tensor: Tensor,
    rows: Sequence[Row],
    reference: Reference,
    moments: StoredMoments | None = None,
) -> Tensor:
    """Mean forward KL per gold token of one batch, differentiable in ``tensor``.

    With ``moments`` the gradient is as exact, and the value is off by about 1e-5 nats.
    """
    return prefix_loss(base, context_prefix(base, kind, tensor), rows, reference, moments)


def prefix_loss(
    base: Base, prefix: Prefix, rows: Sequence[Row], reference: Reference, moments: StoredMoments | None
) -> Tensor:
    """As :func:`context_loss`, after a prefix."""
    batch = make_batch(rows, range(len(rows))).to(base.device)
    hidden = gold_hidden(base, prefix, batch)
    ids = [row.example_id for row in rows]
    stored = moments.of(ids, base.device) if moments else reference.hidden(ids).to(base.device)
    return linear_kl(hidden, stored, base.head, options=KLOptions()).loss


def differentiated_loss(
    base: Base,
    kind: str,
    tensor: Tensor,
    rows: Sequence[Row],
    reference: Reference,
    moments: StoredMoments | None = None,
    *,
    leaf: Tensor,
    at_once: int | None = None,
) -> float:
    """:func:`context_loss` of a batch, with its gradient added to ``leaf.grad``.

    Args:
        leaf: what ``tensor`` is a function of.
        at_once: rows whose activations are held at the same time; the prefix is computed once for all of them.
    """
    divided = LAUNCH.divides(base)
    if not divided and (at_once is None or at_once >= len(rows)):
        loss = context_loss(base, kind, tensor, rows, reference, moments)
        loss.backward(inputs=[leaf])
        return float(loss.detach())
    whole = context_prefix(base, kind, tensor).stack().float() if kind == "soft" else tensor
    given = base, whole.detach(), rows, reference, moments, at_once or len(rows)
    summed = LAUNCH.summed(_part_gradient, *given) if divided else _part_gradient(*given)
    whole.backward(summed[:-1].reshape_as(whole), inputs=[leaf])
    return float(summed[-1])


def _part_gradient(
    base: Base,
    slots: Tensor,
    rows: Sequence[Row],
    reference: Reference,
    moments: StoredMoments | None,
    at_once: int,
) -> Tensor:
    """This process's part of a batch's gradient by its slots, flat fp32, and of its loss: the last element.

    Each row counts by its gold tokens among those of the whole batch, so that the parts of all processes add up to it.
    """
    slots = slots.to(base.device).requires_grad_(True)
    gold, total = sum(len(row.gold) for row in rows), 0.0
    mine = rows[LAUNCH.rank * len(rows) // LAUNCH.count : (LAUNCH.rank + 1) * len(rows) // LAUNCH.count]
    for first in range(0, len(mine), at_once):
        part = mine[first : first + at_once]
        share = sum(len(row.gold) for row in part) / gold
        loss = share * prefix_loss(base, Prefix.unstack(slots, base.dtype), part, reference, moments)
        loss.backward(inputs=[slots])
        total += float(loss.detach())
    gradient = torch.zeros_like(slots) if slots.grad is None else slots.grad  # more processes than rows
    return torch.cat([gradient.flatten(), slots.new_tensor([total])])


def _loss_of_step(job: _Job, state: DescentState, keeper: CheckpointKeeper) -> float:
    """The loss of the next step's batch, and its gradient, clipped, in ``state.trainable.grad``."""
    config, trainable = job.config, state.trainable
    rows = [job.train[i] for i in batch_at(state.step, len(job.train), config.batch_size, job.seed)]
    state.optimizer.zero_grad(set_to_none=True)
    tensor, at_once = _whole(job.frozen, trainable), config.micro_batch_size
    loss_value = differentiated_loss(
        job.base, config.kind, tensor, rows, job.reference, job.moments, leaf=trainable, at_once=at_once
    )
    assert trainable.grad is not None
    norm = float(trainable.grad.norm())
    if not (math.isfinite(loss_value) and math.isfinite(norm)):
        keeper.save()
        kept = (
            f"the best state, of step {state.best_step}, is kept in {keeper.path}" if keeper.path else "nothing is kept"
        )
        raise KvoptError(
            f"contexts.{config.name}: loss {loss_value} with gradient norm {norm} at step {state.step}; {kept};"
            " lower learning_rate"
        )
    trainable.grad.mul_(min(1.0, config.clip / (norm + 1e-12)))
    return loss_value


def _whole(frozen: Tensor, trainable: Tensor) -> Tensor:
    """Frozen and trainable slots as one tensor, differentiable; the trainable ones themselves where none is frozen."""
    return torch.cat([frozen, trainable]) if len(frozen) else trainable


def _move(job: _Job, state: DescentState, loss: float) -> None:
    """One step of the optimizer along the gradient that is there."""
    config = job.config
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate_at(state.step, config)
    state.optimizer.step()
    state.step += 1
    state.recent.append(loss)


def _measure(job: _Job, state: DescentState) -> None:
    with torch.no_grad():
        tensor = _whole(job.frozen, state.trainable.detach())
        prefix = context_prefix(job.base, job.config.kind, tensor)
    scores = score_prefix(job.base, prefix, job.held_out, job.reference, batch_size=job.config.batch_size)
    held_out = float(scores.kl.double().mean())
    if not math.isfinite(held_out):
        raise KvoptError(
            f"contexts.{job.config.name}: held-out KL is {held_out} at step {state.step}; lower learning_rate"
        )
    train = sum(state.recent) / len(state.recent) if state.recent else None
    point: dict[str, Any] = {"step": state.step, "train_kl": train, "held_out_kl": held_out}
    value = held_out
    if job.choose is not None:
        point["chosen_by"] = value = job.choose(prefix, scores)
    state.history.append(point)
    state.recent = []
    if (value, held_out) < (state.best_value, state.best_kl):
        state.best.copy_(tensor)
        state.best_kl, state.best_step, state.since_best = held_out, state.step, 0
        state.best_value = value
    else:
        state.since_best += 1
