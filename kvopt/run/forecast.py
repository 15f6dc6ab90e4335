"""What a run will take, before it is paid for: tokens, FLOPs, peak memory and time of each stage, from the config, the
rows and the tokenizer, without weights.

Tokens are counted as the ledger counts them. FLOPs are those of all matrix products, with rows packed or padded as the
run does it. Memory is weights, kept activations and chunks of logits, and on a CPU the process itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch

from kvopt.base.packing import one_line, pack
from kvopt.base.workload import Gradient, Shape, Workload
from kvopt.config.contexts import ContextConfig
from kvopt.config.document import Config
from kvopt.kernels import KLOptions
from kvopt.kernels.plan import rows_per_chunk
from kvopt.learning.descent import batch_at
from kvopt.measure.racing import heats
from kvopt.measure.reference import FACTS_ROWS, ROWS_PER_SHARD
from kvopt.run.encoded_task import EncodedTask
from kvopt.run.stages import drawn_rows, drawn_tokens
from kvopt.task.seam import Row, length_buckets

SCORE_PRODUCTS, FACTS_PRODUCTS, STEP_PRODUCTS = 2, 1, 3
"""Products of gold positions with the head: of a score, of what scores need of the reference alone, of a step."""


@dataclass
class Work:
    """FLOPs of a stage by the kind of pass, and the most bytes that it needs beyond weights and process.

    Attributes:
        forward: through layers, without a gradient.
        backward: through layers with a gradient, forward and back.
        head: products with the output head.
        extra_bytes: the most of any moment.
    """

    forward: int = 0
    backward: int = 0
    head: int = 0
    extra_bytes: int = 0

    @property
    def flops(self) -> int:
        return self.forward + self.backward + self.head

    def add(self, other: Work) -> None:
        self.forward += other.forward
        self.backward += other.backward
        self.head += other.head
        self.extra_bytes = max(self.extra_bytes, other.extra_bytes)


@dataclass
class Stage:
    """One stage of a run.

    Attributes:
        name: as in the ledger.
        tokens_in: through the model, as the ledger counts them.
        about: why the counts are not exact; empty where they are.
        setting: the key that makes its batches smaller, and ``halved``, its work with batches of so many rows.
    """

    name: str
    tokens_in: int
    work: Work
    about: str = ""
    setting: str = ""
    smaller: Callable[[int], int] | None = field(default=None, repr=False)
    rows: int = 0


class Forecast:
    """The stages of a run of this task.

    Args:
        task: template and rows, encoded; its base may be without weights.
        workload: of the base.
        device: the kind of device that it is planned for: cpu or cuda.
    """

    def __init__(self, task: EncodedTask, workload: Workload, device: Literal["cpu", "cuda"]) -> None:
        self.task, self.workload, self.device = task, workload, torch.device(device)

    @property
    def config(self) -> Config:
        return self.task.config

    @cached_property
    def stages(self) -> list[Stage]:
        """In the order of a run."""
        stages = [self._reference()]
        task, config = self.task, self.config
        template = len(task.encoded.prefix)
        validation, size = task.rows("validation").rows, config.score.batch_size
        stages.append(self._original(template, validation))
        stages += self._scores("none", task.none.tokens)
        if task.dataset.selection:
            stages[-2].work.add(self._facts("selection"))
        for context in config.written:
            stages += self._scores(context.name, template, about="taken to be as long as the template", bare=False)
        if config.mutations.count:
            about = "each taken to be as long as the template; none rejected"
            stages.append(self._mutations(template, size, about))
            best = self._score("", template, validation, size)
            stages.append(_times(best, min(config.score.best, config.mutations.count), "scores/best mutations", about))
        for context in config.learned:
            stages += self._learned(context)
        return stages

    @cached_property
    def not_counted(self) -> list[str]:
        """What a run of this config does beside the stages here, in words."""
        config = self.config
        mutations, students = config.mutations, [student.name for student in config.students]
        given = {
            "answers for the report's samples and for metrics": bool(config.report.examples),
            "paraphrases by a model": mutations.count and mutations.generator.kind in ("local", "extract"),
            "the search for shorter texts": bool(config.shortened),
            "the fit of starts (init: matched, salient)": any(
                c.start.kind in ("matched", "salient") for c in config.learned
            ),
            "students: " + ", ".join(students): bool(students),
        }
        return [what for what, there in given.items() if there]

    # ---- stages

    def _mutations(self, template: int, size: int, about: str) -> Stage:
        """Every mutation on the selection rows; with a race, each on as many as it runs on, rows being alike."""
        config, rows = self.config, self.task.rows("selection").rows
        count, name = config.mutations.count, "scores/mutations.selection"
        once = self._score("", template, rows, size)
        race = config.score.race
        planned = heats(count, config.score.finalists, len(rows), race.share) if race is not None else ()
        if not planned:
            return _times(once, count, name, about)
        stage = _times(once, config.score.finalists, name, f"{about}; the race's rows taken to be its first")
        for heat in planned:
            part = self._score("", template, rows[heat.first : heat.last], size)
            part = _times(part, heat.contestants if heat.last > heat.first else 0, name, about)
            stage.tokens_in += part.tokens_in
            stage.work.add(part.work)
        return stage

    def _reference(self) -> Stage:
        """First of the rows that contexts are scored on, then of those that descents draw."""
        template, size = len(self.task.encoded.prefix), self.config.reference.batch_size
        drawn = drawn_rows(self.task) if any(context.steps for context in self.config.learned) else set()
        first = self._scored_rows
        known = {row.example_id for row in first}
        more = [r for r in self.task.encoded.rows if r.example_id in drawn and r.example_id not in known]
        work, tokens = Work(), 0
        for rows in filter(None, (first, more)):
            tokens += template + sum(map(len, rows))
            work.add(self._prefill(template))
            for begin in range(0, len(rows), ROWS_PER_SHARD):
                work.add(self._bodies(rows[begin : begin + ROWS_PER_SHARD], template, size))

        def smaller(batch: int) -> int:
            return max(self._bodies_bytes(rows, template, batch) for rows in (first, more))

        return Stage("reference", tokens, work, "", "reference.batch_size", smaller, size)

    @cached_property
    def _scored_rows(self) -> list[Row]:
        """Selection and validation rows, as the reference stores them."""
        dataset = self.task.dataset
        wanted = {example.id for example in (*dataset.selection, *dataset.validation)}
        return [row for row in self.task.encoded.rows if row.example_id in wanted]

    def _original(self, template: int, validation: Sequence[Row]) -> Stage:
        """The noise floor, which is the original's score in batches of another size, and its own by stored states."""
        size, reference = max(1, self.config.score.batch_size // 3), self.config.reference.batch_size
        stage = self._score(
            "scores/original.validation", template, validation, reference + 1 if size == reference else size
        )
        stage.work.add(self._facts("validation"))
        gold = sum(len(row.gold) for row in validation)
        stage.work.add(Work(head=self.workload.head_flops(gold, SCORE_PRODUCTS), extra_bytes=self._logit_bytes(gold)))
        return stage

    def _score(
        self, name: str, slots: int, rows: Sequence[Row], size: int, about: str = "", prefill: bool = True
    ) -> Stage:
        work = self._prefill(slots) if prefill else Work()
        work.add(self._scored(rows, slots, size))

        def smaller(batch: int) -> int:
            return self._scored(rows, slots, batch).extra_bytes

        tokens = slots + sum(map(len, rows))
        return Stage(name, tokens, work, about, "score.batch_size", smaller, size)

    def _learned(self, context: ContextConfig) -> list[Stage]:
        """The descent of a context, and its scores."""
        task, kind = self.task, context.kind
        train, held_out = task.bare_rows("train").rows, task.bare_rows("selection").rows
        start = len(task.start_ids)
        slots, about = context.tokens or start, ""
        if context.tokens is None and context.start.source is not None:
            about = "taken to be as long as the template"
        seed = self.config.seed if context.seed is None else context.seed
        steps = [
            [train[i] for i in batch_at(step, len(train), context.batch_size, seed)] for step in range(context.steps)
        ]
        micro = context.micro_batch_size or context.batch_size
        work = self._prefill(0 if kind == "soft" else self._start(context.start.kind, slots, start))
        for rows in steps:
            work.add(self._step(kind, slots, rows, micro))
        work.extra_bytes = max([work.extra_bytes, *(self._step_bytes(kind, slots, r, micro) for r in _longest(steps))])
        measured = 1 + len({*range(context.eval_every, context.steps + 1, context.eval_every), context.steps} - {0})
        for _ in range(measured):
            work.add(self._scored(held_out, slots, context.batch_size))
            if kind == "soft":
                work.add(self._prefill(slots))
        read = drawn_tokens(train, context.batch_size, context.steps, seed)
        read += context.steps * slots if kind == "soft" else 0
        patience = "" if context.patience is None else "patience may end it earlier"

        def smaller(batch: int) -> int:
            return max((self._step_bytes(kind, slots, rows, batch) for rows in _longest(steps)), default=0)

        tokens = read + measured * sum(map(len, held_out))
        key = f"contexts.{context.name}.micro_batch_size"
        name = f"contexts/{context.name}"
        stage = Stage(name, tokens, work, about or patience, key, smaller, min(micro, len(train)))
        return [stage, *self._scores(context.name, slots, about, prefill=kind == "soft")]

    @staticmethod
    def _start(kind: str, slots: int, text: int) -> int:
        """Tokens that a start of a KV cache runs through the base."""
        if kind in ("strided", "matched", "salient", "random"):
            return text
        return 0 if kind == "context" else slots

    def _scores(
        self, name: str, slots: int, about: str = "", *, prefill: bool = True, bare: bool = True
    ) -> list[Stage]:
        """A context on the selection and the validation rows."""
        stages = []
        for split in ("selection", "validation"):
            rows = (self.task.bare_rows(split) if bare else self.task.rows(split)).rows
            if rows:
                size = self.config.score.batch_size
                stages.append(self._score(f"scores/{name}.{split}", slots, rows, size, about, prefill))
        return stages

    def _facts(self, split: str) -> Work:
        """Computed once, for blocks of stored rows: those of the validation rows first, which may hold others too."""
        first = {example.id for example in self.task.dataset.validation}
        blocks: dict[tuple[int, int], list[Row]] = {}
        for place, row in enumerate(self._scored_rows):
            shard, inside = divmod(place, ROWS_PER_SHARD)
            blocks.setdefault((shard, inside // FACTS_ROWS), []).append(row)
        chosen = [b for b in blocks.values() if any(r.example_id in first for r in b) == (split == "validation")]
        gold = [sum(len(row.gold) for row in block) for block in chosen]
        return Work(
            head=self.workload.head_flops(sum(gold), FACTS_PRODUCTS),
            extra_bytes=self._logit_bytes(max(gold, default=0)),
        )

    # ---- passes

    def _prefill(self, slots: int) -> Work:
        if not slots:
            return Work()
        shape = Shape(1, slots, 0)
        return Work(self.workload.flops(shape), extra_bytes=self._passing_bytes(shape))

    def _bodies(self, rows: Sequence[Row], slots: int, size: int) -> Work:
        shapes = self._shapes(rows, slots, size)
        return Work(sum(map(self.workload.flops, shapes)), extra_bytes=self._bodies_bytes(rows, slots, size))

    def _bodies_bytes(self, rows: Sequence[Row], slots: int, size: int) -> int:
        return max((self._passing_bytes(shape) for shape in _largest(self._shapes(rows, slots, size))), default=0)

    def _shapes(self, rows: Sequence[Row], slots: int, size: int) -> list[Shape]:
        return [self.shape_of([rows[i] for i in index], slots) for index in length_buckets(rows, size)]

    def _scored(self, rows: Sequence[Row], slots: int, size: int) -> Work:
        work = self._bodies(rows, slots, size)
        gold = [sum(len(rows[i].gold) for i in index) for index in length_buckets(rows, size)]
        work.head += self.workload.head_flops(sum(gold), SCORE_PRODUCTS)
        work.extra_bytes += self._logit_bytes(max(gold, default=0))
        return work

    def _step(self, kind: str, slots: int, rows: Sequence[Row], micro: int) -> Work:
        work = Work(head=self.workload.head_flops(sum(len(row.gold) for row in rows), STEP_PRODUCTS))
        if kind == "soft":
            work.backward += self.workload.flops(Shape(1, slots, 0), "inputs")
        for part in _parts(rows, micro):
            work.backward += self.workload.flops(self.shape_of(part, slots), "prefix")
        return work

    def _step_bytes(self, kind: str, slots: int, rows: Sequence[Row], micro: int) -> int:
        """Activations of the largest part, what a layer holds on its way, the context's state and chunks of logits."""
        parts = _parts(rows, micro)
        held = 6 * self.workload.context_bytes(slots) * 4 // self.workload.dtype.itemsize if kind == "kv" else 0
        if kind == "soft":
            held = self._saved_bytes(Shape(1, slots, 0), "inputs")
        [largest] = _largest([self.shape_of(part, slots) for part in parts])
        logits = self._logit_bytes(max(sum(len(row.gold) for row in part) for part in parts))
        return held + self._saved_bytes(largest, "prefix") + max(self._passing_bytes(largest), logits)

    def shape_of(self, rows: Sequence[Row], slots: int) -> Shape:
        """How a batch stands behind the prefix, as :func:`kvopt.base.prefix.packing_for` decides."""
        lengths, attention = [len(row) - 1 for row in rows], self.config.model.attention
        if attention != "padded":
            if self.device.type == "cuda" and self.config.model.attn_implementation == "auto":
                pairs = sum(n * slots + n * (n + 1) // 2 for n in lengths)
                return Shape(1, one_line(lengths).width, slots, pairs)
            if slots and self._apart:
                return Shape(1, sum(lengths), slots, sum(n * (slots + n) for n in lengths))
            packed = pack(lengths, slots, always=attention == "packed") if self._packs else None
            if packed is not None:
                return Shape(packed.lines, packed.width, slots)
        return Shape(len(lengths), max(lengths), slots)

    @property
    def _apart(self) -> bool:
        named = self.config.model.attn_implementation == "auto"
        return named and self.device.type == "cpu" and self.workload.plain

    @property
    def _packs(self) -> bool:
        named = self.config.model.attn_implementation in ("auto", "sdpa", "eager")
        return named and (self.device.type == "cpu" or self.config.model.attention == "packed")

    # ---- memory

    def _saved_bytes(self, shape: Shape, gradient: Gradient) -> int:
        key = shape, gradient
        if key not in self._known:
            self._known[key] = self.workload.saved_bytes(shape, gradient)
        return self._known[key]

    def _passing_bytes(self, shape: Shape) -> int:
        key = shape, "none"
        if key not in self._known:
            self._known[key] = self.workload.passing_bytes(shape)
        return self._known[key]

    @cached_property
    def _known(self) -> dict[tuple[Shape, str], int]:
        """Bytes by shape and gradient."""
        return {}

    def _logit_bytes(self, gold: int) -> int:
        """Of the chunks in which the divergence op holds logits."""
        w = self.workload
        rows = min(gold, rows_per_chunk(self.device, w.vocab_size, w.dtype, w.dtype, KLOptions()))
        return rows * w.vocab_size * (2 * w.dtype.itemsize) + gold * w.hidden_size * 3 * w.dtype.itemsize


def _largest(shapes: Sequence[Shape]) -> list[Shape]:
    """The shape that takes most memory, alone in a list; none of none."""
    return sorted(shapes, key=lambda shape: (shape.positions, shape.width))[-1:]


def _parts(rows: Sequence[Row], micro: int) -> list[Sequence[Row]]:
    return [rows[first : first + micro] for first in range(0, len(rows), micro)]


def _longest(steps: Sequence[Sequence[Row]]) -> Iterator[Sequence[Row]]:
    """The steps that may need most memory: the one with most tokens, the one with the longest row."""
    if steps:
        yield max(steps, key=lambda rows: sum(map(len, rows)))
        yield max(steps, key=lambda rows: max(map(len, rows)))


def _times(stage: Stage, count: int, name: str, about: str) -> Stage:
    work = stage.work
    many = Work(count * work.forward, count * work.backward, count * work.head, work.extra_bytes)
    return Stage(name, count * stage.tokens_in, many, about, stage.setting, stage.smaller, stage.rows)
