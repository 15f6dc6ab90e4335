"""Rows under many wordings, for training loops of others: a data set for ``transformers.Trainer`` and its subclasses.

Items are what such loops take: ``input_ids``, and ``labels`` that are −100 outside the gold output. Both are cut at the
token seam (``kvopt.task.seam``), so the gold ids of a row are the same under every wording, and under the original
alone the loss is that of the same rows without kvopt.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from kvopt.config.schedules import SCHEDULES, Schedule
from kvopt.config.students import ContextChoice
from kvopt.contexts import TextContext
from kvopt.errors import InputError, from_extra
from kvopt.export.row_formats import IGNORED, labelled
from kvopt.task.columns import Columns, NoValue
from kvopt.task.examples import Example
from kvopt.task.seam import Encoder, Row, SeamError
from kvopt.task.template import Template
from kvopt.train.pool import Pool, PoolContext
from kvopt.train.stream import Stream

if TYPE_CHECKING:
    from datasets import Dataset

TemplateLike = str | Sequence[Mapping[str, str]] | Template
PEEKS = 2
"""Items that a trainer may look at before it trains."""


class ContextDataset(TorchDataset[dict[str, list[int]]]):
    """Rows, each under a wording that the schedule chooses.

    An index is a row (with ``expand`` a row under a context), so the trainer's own sampler decides the order. Which
    wording a row meets depends on the seed, the epoch and the row, or on the step: :class:`kvopt.train.ContextClock`,
    a callback, tells the data set both.

    Args:
        rows: mappings with the slots' values and the output, or a ``datasets.Dataset`` of them.
        contexts: a template (text with ``{{slots}}``, or chat messages), or several by name. The gold ids are those
            under the first.
        tokenizer: of the model that is trained.
        schedule: ``resample`` (each row another wording each epoch), ``{"kind": "resample", "every": K}`` (one wording
            for all rows of K steps), ``expand`` (every row under every wording once an epoch), ``state-adaptive``, or
            any other of ``kvopt config --reference``, with its options.
        weights: how often each context is met, by name; 1 where it is not named. ``expand`` takes whole numbers.
        columns, output: the columns of slots that have another name, and of the output.
        seed: of all draws.
        end_token, chat_kwargs, answer_prefix: as in the config's ``template`` section.
        max_length: the most tokens of a row; a longer one is an error. All rows are encoded here, under every
            context, so that a fault is told before training.
        now: what a chat template's clock says; None: the time of the call.

    Raises:
        InputError: a row without a value, slots that are not those of the first template, gold ids that change under a
            wording, a row that is too long, an unknown schedule or weight.
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        contexts: TemplateLike | Mapping[str, TemplateLike],
        tokenizer: Any,
        *,
        schedule: str | Mapping[str, Any] = "resample",
        weights: Mapping[str, float] | None = None,
        columns: Mapping[str, str] | None = None,
        output: str = "output",
        seed: int = 0,
        end_token: bool | str = True,
        chat_kwargs: Mapping[str, Any] | None = None,
        answer_prefix: str | None = None,
        max_length: int | None = None,
        now: datetime | None = None,
    ) -> None:
        templates = _templates(contexts)
        examples = _examples(rows, next(iter(templates.values())), columns or {}, output)
        encoder = Encoder(tokenizer, chat_kwargs or {}, end_token, answer_prefix, now)
        self._build(examples, templates, weights or {}, encoder, schedule, seed, max_length)

    @classmethod
    def of_run(
        cls,
        run: str | Path,
        contexts: Sequence[str] = ("original", "best-mutations:8"),
        *,
        tokenizer: Any = None,
        split: str = "train",
        schedule: str | Mapping[str, Any] = "resample",
        weights: Mapping[str, float] | None = None,
        config: str | Path | None = None,
        seed: int | None = None,
        max_length: int | None = None,
    ) -> ContextDataset:
        """The rows of a run directory under texts that it found.

        Args:
            run: the run directory.
            contexts: as in a student's section of the config; texts alone.
            tokenizer: default: that of the run's base.
            split: train, selection or validation.
            schedule, weights, max_length: as above; weights by the contexts' own names.
            config: the run's own config, where its data are not found without it.
            seed: default: the config's.

        Raises:
            InputError: as above, or a context that is no text or not there.
        """
        from kvopt.base.loading import load_tokenizer
        from kvopt.export.source import read_run
        from kvopt.export.training_rows import text_templates
        from kvopt.run.inputs import inputs_of_run

        if split not in ("train", "selection", "validation"):
            raise InputError(f"no split {split!r}", where="split", fix="train, selection or validation")
        folder = Path(run)
        inputs, facts = inputs_of_run(folder, Path(config) if config else None), read_run(folder)
        seed = inputs.config.seed if seed is None else seed
        choices = [ContextChoice(context=name) for name in contexts]
        templates = {name: template for name, template, _ in text_templates(inputs, folder, choices, seed)}
        tokenizer = load_tokenizer(inputs.config.model)[0] if tokenizer is None else tokenizer
        encoder = Encoder.of(tokenizer, inputs.config.template, facts.now)
        made = cls.__new__(cls)
        made._build(getattr(inputs.dataset, split), templates, weights or {}, encoder, schedule, seed, max_length)
        return made

    def _build(
        self,
        examples: Sequence[Example],
        templates: Mapping[str, Template],
        weights: Mapping[str, float],
        encoder: Encoder,
        schedule: str | Mapping[str, Any],
        seed: int,
        max_length: int | None,
    ) -> None:
        self.schedule = _schedule(schedule)
        _check_weights(weights, templates, self.schedule)
        self.tokenizer = encoder.tokenizer
        self.pool = _encoded(examples, templates, weights, encoder, max_length)
        self.stream = _InOrder(self.schedule, self.pool.rows, self.pool.weights, seed)
        # in shared memory, so that a loader's worker processes see what the callbacks say
        self._time = torch.zeros(3, dtype=torch.int64).share_memory_()  # epoch, step, whether anybody told
        self._kept = torch.zeros(len(self.pool.contexts), dtype=torch.bool).share_memory_()
        self._batch, self._fetched = 1, 0

    # ---- what callbacks tell

    @property
    def names(self) -> list[str]:
        """Of the contexts."""
        return [context.name for context in self.pool.contexts]

    @property
    def follows_steps(self) -> bool:
        """Whether the wording depends on the step, and not on row and epoch alone."""
        return self.schedule.by_step or self.schedule.adapts

    def set_epoch(self, epoch: int) -> None:
        """The epoch that begins, from 0."""
        self._time[0], self._time[2] = epoch, 1

    def begin(self, epoch: int, step: int, batch: int) -> None:
        """An epoch begins, before optimizer step ``step`` (from 0), with ``batch`` items a step in this process."""
        self.set_epoch(epoch)
        self._time[1] = step
        self._batch, self._fetched = batch, 0

    def keep(self, names: Sequence[str]) -> None:
        """The contexts to draw from now on, of a schedule that adapts."""
        for i, name in enumerate(self.names):
            self._kept[i] = name in names

    # ---- items

    def __len__(self) -> int:
        return self.stream.per_epoch

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """``input_ids`` and ``labels`` of the row at ``index``, under the context that it meets now."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row, context = self.meets(index % len(self))
        self._fetched += 1
        return self.item(row, context)

    def meets(self, index: int) -> tuple[int, int]:
        """(row, context) at an index, now. Raises InputError where no callback told what that depends on."""
        epoch, step, told = self._time.tolist()
        self._check_told(bool(told))
        position = epoch * len(self) + index
        kept = tuple(self._kept.nonzero()[:, 0].tolist())
        if self.schedule.adapts and not kept:
            kept = (0,)  # a look before training; more of them are refused
        if self.schedule.by_step:
            return self.stream.row(position), self.stream.context(step + self._fetched // self._batch, kept)
        return self.stream.row(position), self.stream.context(position, kept)

    def _check_told(self, told: bool) -> None:
        if len(self.pool.contexts) == 1:
            return
        if self.schedule.adapts and not self._kept.any():
            limit, callback = PEEKS, "StateAdaptive"
        elif told:
            return
        else:
            processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
            limit = PEEKS + (0 if self.follows_steps else math.ceil(len(self) / processes))
            callback = "ContextClock"
        if self._fetched >= limit:
            what = "the wordings change while a model is trained, and nothing tells the data set when"
            raise InputError(what, where="ContextDataset", fix=f"give the trainer the callback {callback}(dataset)")

    def item(self, row: int, context: int) -> dict[str, list[int]]:
        """``input_ids`` and ``labels`` of a row under a context, by their numbers."""
        return item_of(self.pool.contexts[context].rows[row])

    def for_trl(self) -> Dataset:
        """The same items as a ``datasets.Dataset``, which TRL's trainers insist on; they are made when they are asked
        for, so ``SFTConfig`` needs ``dataset_kwargs={"skip_prepare_dataset": True}`` and
        ``remove_unused_columns=False``.
        """
        with from_extra("data", "needs datasets", "ContextDataset.for_trl"):
            from datasets import Dataset
        indices = Dataset.from_dict({"row": list(range(len(self)))})

        def items(batch: dict[str, list[int]]) -> dict[str, list[list[int]]]:
            made = [self[i] for i in batch["row"]]
            return {key: [item[key] for item in made] for key in ("input_ids", "labels")}

        return indices.with_transform(items)


@dataclass(frozen=True)
class ContextCollator:
    """Batches of items, padded on the right.

    Attributes:
        pad_id: the id that padding has; the attention mask is 0 there and the label −100. None: 0.
        multiple: widths are multiples of it.
    """

    pad_id: int | None = None
    multiple: int = 1

    @classmethod
    def of(cls, tokenizer: Any, multiple: int = 1) -> ContextCollator:
        """With the tokenizer's padding token, else its EOS."""
        return cls(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id, multiple)

    def __call__(self, items: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels``, [B, n] int64."""
        width = max(len(item["input_ids"]) for item in items)
        width = math.ceil(width / self.multiple) * self.multiple
        ids = torch.full((len(items), width), self.pad_id or 0, dtype=torch.int64)
        labels = torch.full((len(items), width), IGNORED, dtype=torch.int64)
        mask = torch.zeros(len(items), width, dtype=torch.int64)
        for i, item in enumerate(items):
            length = len(item["input_ids"])
            ids[i, :length] = torch.tensor(item["input_ids"])
            labels[i, :length] = torch.tensor(item["labels"])
            mask[i, :length] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class _InOrder(Stream):
    """A stream whose epochs are in the rows' own order: the trainer's sampler shuffles."""

    def order(self, count: int, epoch: int) -> tuple[int, ...]:
        return tuple(range(count))


def item_of(row: Row) -> dict[str, list[int]]:
    """:func:`kvopt.export.row_formats.labelled` ids of a row that is a whole prompt with its output."""
    return labelled(row.body, row.gold)


def _encoded(
    examples: Sequence[Example],
    templates: Mapping[str, Template],
    weights: Mapping[str, float],
    encoder: Encoder,
    max_length: int | None,
) -> Pool:
    contexts: list[PoolContext] = []
    gold: dict[str, tuple[int, ...]] | None = None
    for name, template in templates.items():
        try:
            encoded = encoder.encode(template, examples, gold=gold, window=max_length)
        except SeamError as error:
            where = f"contexts.{name}, {error.where}"
            raise InputError(error.what, where=where, fix=error.fix or "leave this context out") from None
        gold = gold or {row.example_id: row.gold for row in encoded.rows}
        contexts.append(PoolContext(TextContext(name, template, encoded), weights.get(name, 1.0), encoded))
    return Pool(tuple(contexts))


def _templates(contexts: TemplateLike | Mapping[str, TemplateLike]) -> dict[str, Template]:
    named = contexts if isinstance(contexts, Mapping) else {"original": contexts}
    if not named:
        raise InputError("no template", where="contexts", fix='give {"original": "… {{slot}} …"}')
    made = {name: _template(value, f"contexts.{name}") for name, value in named.items()}
    first = next(iter(made.values()))
    for name, template in made.items():
        if set(template.slots) != set(first.slots):
            slots = [", ".join(one.slots) for one in (template, first)]
            raise InputError(f"has the slots {slots[0]}, the first has {slots[1]}", where=f"contexts.{name}")
    return made


def _template(value: TemplateLike, where: str) -> Template:
    if isinstance(value, Template):
        return value
    if isinstance(value, str):
        return Template.from_text(value, where=where)
    if isinstance(value, Sequence):
        messages: Sequence[Any] = value
        return Template.from_messages(messages, where=where)
    raise InputError(f"must be text or chat messages, not {value!r}", where=where)


def _examples(
    rows: Iterable[Mapping[str, Any]], template: Template, paths: Mapping[str, str], output: str
) -> list[Example]:
    columns = Columns(template.slots, paths, output)
    examples = []
    for number, row in enumerate(rows):
        where = f"rows[{number}]"
        if not isinstance(row, Mapping):
            raise InputError(f"must be a mapping, not {type(row).__name__}", where=where)
        try:
            examples.append(Example(f"row:{number}", columns.values(row), columns.gold(row), where))
        except NoValue as error:
            raise InputError(str(error), where=where, fix="name the columns with columns and output") from None
    if not examples:
        raise InputError("has no rows", where="rows")
    return examples


def _schedule(given: str | Mapping[str, Any]) -> Schedule:
    settings = {"kind": given} if isinstance(given, str) else dict(given)
    if settings.get("kind") not in SCHEDULES.kinds:
        fix = "one of " + ", ".join(SCHEDULES.kinds)
        raise InputError(f"no schedule {settings.get('kind')!r}", where="schedule", fix=fix)
    try:
        return TypeAdapter[Schedule](SCHEDULES.options(settings["kind"])).validate_python(settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(first["msg"], where=".".join(map(str, ("schedule", *first["loc"])))) from None


def _check_weights(weights: Mapping[str, float], templates: Mapping[str, Template], schedule: Schedule) -> None:
    for name, weight in weights.items():
        where = f"weights.{name}"
        if name not in templates:
            raise InputError("there is no such context", where=where, fix="known: " + ", ".join(templates))
        if not weight > 0 or not math.isfinite(weight):
            raise InputError(f"must be above 0, not {weight}", where=where, fix="leave the context out")
        if schedule.whole_weights and weight != int(weight):
            raise InputError(f"{schedule.kind} takes whole numbers, not {weight}", where=where)
