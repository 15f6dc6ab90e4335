"""Callbacks for ``transformers.Trainer`` and its subclasses, such as TRL's ``SFTTrainer``, beside a
:class:`kvopt.train.ContextDataset`.

What they measure goes into ``state.log_history`` and into the next line that the trainer logs. The trainer's own
reporters (TensorBoard, Weights & Biases, …) see it too where ``callback.report = trainer.log``. Every process measures
the same rows by itself, without autocast; a model that is shared out over processes (FSDP, DeepSpeed ZeRO-3) is not
supported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, extract_model_from_parallel
from torch import Tensor, nn
from transformers import TrainerCallback

from kvopt.errors import InputError, KvoptError
from kvopt.export.row_formats import IGNORED
from kvopt.train.context_dataset import ContextCollator, ContextDataset

Item = dict[str, list[int]]


class ContextClock(TrainerCallback):
    """Tells a data set which epoch and which step it is, so that wordings change when its schedule says so.

    Args:
        dataset: what the trainer trains on.
    """

    def __init__(self, dataset: ContextDataset) -> None:
        self.dataset = dataset

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises InputError where several workers fetch rows whose wordings depend on the step."""
        if self.dataset.follows_steps and args.dataloader_num_workers:
            raise InputError(
                "rows are fetched by worker processes, which do not know the step that the wordings depend on",
                where="dataloader_num_workers",
                fix="set it to 0",
            )

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        epoch = math.floor((state.epoch or 0) + 1e-6)
        self.dataset.begin(epoch, state.global_step, args.train_batch_size * args.gradient_accumulation_steps)


class _Measuring(TrainerCallback):
    """Measures now and then, and logs: before the first step, every ``every`` steps, and after the last."""

    report: Callable[[dict[str, Any]], object] | None = None

    def __init__(self, every: int, batch_size: int) -> None:
        if every < 1 or batch_size < 1:
            raise InputError(f"every {every} and batch_size {batch_size} must be at least 1", where=type(self).__name__)
        self.every, self.batch_size = every, batch_size
        self._unlogged: dict[str, Any] = {}

    def measured(self, model: nn.Module) -> dict[str, Any]:
        """What is logged, by name."""
        raise NotImplementedError

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._measure(state, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._measure(state, kwargs["model"])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        logs |= {name: value for name, value in self._unlogged.items() if name not in logs}
        self._unlogged = {}

    def _measure(self, state: Any, model: nn.Module) -> None:
        with _measuring(model) as whole:
            values = self.measured(whole)
        self._log(state, values)

    def _log(self, state: Any, values: dict[str, Any]) -> None:
        if self.report is not None:
            self.report(values)
        else:
            state.log_history.append({**values, "epoch": state.epoch, "step": state.global_step})
            self._unlogged |= values


class StateAdaptive(_Measuring, ContextClock):
    """SAPO: scores the contexts of a data set under the model as it is now, and switches to those of the lowest loss.

    The data set's schedule says how often, on how many rows, and how many contexts stay: ``schedule={"kind":
    "state-adaptive", "every": 50, "keep": 2}``. A micro-batch that the trainer has fetched already keeps its wordings:
    accelerate reads one ahead. After an interruption the last choice is taken from the trainer's checkpoint.

    Logged: ``context_nll/NAME`` (nats per gold token) and ``contexts_kept``, their names.

    Raises:
        InputError: the data set has another schedule.
    """

    def __init__(self, dataset: ContextDataset, *, batch_size: int = 16) -> None:
        if not dataset.schedule.adapts:
            fix = 'make the data set with schedule="state-adaptive"'
            raise InputError(f"its schedule is {dataset.schedule.kind!r}", where="StateAdaptive", fix=fix)
        _Measuring.__init__(self, 1, batch_size)
        ContextClock.__init__(self, dataset)

    def measured(self, model: nn.Module) -> dict[str, Any]:
        dataset, schedule = self.dataset, self.dataset.schedule
        rows, contexts = range(min(schedule.scored_rows, dataset.pool.rows)), range(len(dataset.names))
        nll = [gold_nll_of(model, [dataset.item(r, c) for r in rows], self.batch_size) for c in contexts]
        kept = [[dataset.names[i] for i in schedule.choose(nll)]]
        broadcast_object_list(kept)  # rounding may differ between processes, the choice must not
        dataset.keep(kept[0])
        scores = {f"context_nll/{name}": value for name, value in zip(dataset.names, nll, strict=True)}
        return {**scores, "contexts_kept": ", ".join(kept[0])}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ContextClock.on_train_begin(self, args, state, control, **kwargs)
        earlier = [entry["contexts_kept"] for entry in state.log_history if "contexts_kept" in entry]
        if state.global_step and earlier:
            self.dataset.keep(earlier[-1].split(", "))
        else:
            self._measure(state, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.dataset.schedule.rescores_at(state.global_step) and state.global_step < state.max_steps:
            self._measure(state, kwargs["model"])


class WordingProbe(_Measuring):
    """The loss on some rows under each of some wordings, best held-out ones: is it the task that is learned, or its
    wording?

    Args:
        held_out: rows and wordings that are not trained on; its schedule does not matter.
        every: steps between measurements.
        batch_size: rows of a forward pass.

    Logged: ``wording_nll/NAME`` of each, their mean ``wording_nll``, and ``wording_spread``, the largest less the
    smallest; nats per gold token.
    """

    def __init__(self, held_out: ContextDataset, *, every: int = 50, batch_size: int = 16) -> None:
        super().__init__(every, batch_size)
        self.held_out = held_out

    def measured(self, model: nn.Module) -> dict[str, Any]:
        data = self.held_out
        nll = [
            gold_nll_of(model, [data.item(row, context) for row in range(data.pool.rows)], self.batch_size)
            for context in range(len(data.names))
        ]
        each = {f"wording_nll/{name}": value for name, value in zip(data.names, nll, strict=True)}
        return {**each, "wording_nll": sum(nll) / len(nll), "wording_spread": max(nll) - min(nll)}


class ForgettingProbe(_Measuring):
    """KL from the model before training to the model as it is now, on prompts that have nothing to do with the task.

    Args:
        probes: these prompts with some answer each, under one template such as ``"{{prompt}}"``.
        base: the model before training. Default: with PEFT the model without its adapters; else the model at the first
            step, whose log-probabilities on the probes stay in memory (probe gold tokens × vocabulary × 4 bytes).
        every: steps between measurements.
        batch_size: rows of a forward pass.

    Logged: ``forgetting_kl``, nats per gold token of the probes, exact over the vocabulary.

    Raises:
        InputError: at the start of a resumed training of all weights without ``base``; the first step is gone.
    """

    def __init__(
        self, probes: ContextDataset, *, base: nn.Module | None = None, every: int = 50, batch_size: int = 8
    ) -> None:
        super().__init__(every, batch_size)
        self.base = base
        self._before: list[Tensor] = []
        self._items = [probes.item(row, 0) for row in range(probes.pool.rows)]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = extract_model_from_parallel(kwargs["model"])
        if self.base is None and not hasattr(model, "disable_adapter"):
            if state.global_step:
                what = "training goes on from a checkpoint, so the model before training is not there"
                raise InputError(what, where="ForgettingProbe", fix="give it with base=")
            with _measuring(model) as whole:
                self._before = [log_p.cpu() for log_p, _ in _gold_log_probs(whole, self._items, self.batch_size)]
        super().on_train_begin(args, state, control, **kwargs)

    def measured(self, model: nn.Module) -> dict[str, Any]:
        total = torch.zeros((), dtype=torch.float64)
        tokens = 0
        now = _gold_log_probs(model, self._items, self.batch_size)
        for (log_q, _), log_p in zip(now, self._of_base(model), strict=True):
            log_p = log_p.to(log_q.device)
            total += (log_p.exp() * (log_p - log_q)).sum(-1).double().sum().cpu()
            tokens += len(log_q)
        return {"forgetting_kl": float(total) / tokens}

    def _of_base(self, model: nn.Module) -> Iterator[Tensor]:
        if self._before:
            yield from self._before
            return
        base = model if self.base is None else self.base.eval()
        for start in range(0, len(self._items), self.batch_size):
            without: Any = model.disable_adapter() if self.base is None else nullcontext()  # type: ignore[operator]
            with without:
                [(log_p, _)] = _gold_log_probs(base, self._items[start : start + self.batch_size], self.batch_size)
            yield log_p


def gold_nll_of(model: nn.Module, items: Sequence[Item], batch_size: int) -> float:
    """−log q of the gold tokens of some items under a causal LM of transformers, nats per gold token."""
    total, tokens = 0.0, 0
    for log_q, gold in _gold_log_probs(model, items, batch_size):
        total -= float(log_q.gather(-1, gold[:, None]).double().sum())
        tokens += len(gold)
    return total / tokens


@torch.no_grad()
def _gold_log_probs(model: nn.Module, items: Sequence[Item], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(log-probabilities [G, V] float32, gold ids [G]) at the positions that predict gold tokens, batch by batch."""
    device = next(model.parameters()).device
    for start in range(0, len(items), batch_size):
        batch = {key: value.to(device) for key, value in ContextCollator()(items[start : start + batch_size]).items()}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1]
        there = labels != IGNORED
        log_q = logits[there].float().log_softmax(-1)
        if not log_q.isfinite().any(-1).all():
            raise KvoptError("the model's logits are not finite")
        yield log_q, labels[there]


@contextmanager
def _measuring(model: nn.Module) -> Iterator[nn.Module]:
    """The whole model in eval mode; afterwards every module is in the mode it was in."""
    whole = extract_model_from_parallel(model)
    modes = {module: module.training for module in whole.modules()}
    whole.eval()
    try:
        yield whole
    finally:
        for module, mode in modes.items():
            module.training = mode
