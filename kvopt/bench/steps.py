"""``kvopt bench score`` and ``kvopt bench step``: what the shared prefix and the divergence op buy, in one run.

From a config each variant runs in a process of its own, in turn, so that its peak memory is its own; times are medians.
The variants themselves take a ready base (``StepCase``, ``ScoreCase``), so that a model that was never stored on disk
can be measured in the same way, inside one process.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from kvopt.base.loading import Base
from kvopt.base.prefix import Prefix, packing_for
from kvopt.bench.floor import fitting_rows, fitting_scores, products
from kvopt.bench.variants import Variant, measured
from kvopt.config.contexts import Init
from kvopt.config.document import Config
from kvopt.contexts import TextContext
from kvopt.kernels.memory import reset_peak
from kvopt.learning.descent import context_loss
from kvopt.learning.start_task import StartTask, initial_tensor
from kvopt.measure.reference import Reference, build_reference
from kvopt.measure.score import score_tokens
from kvopt.run.run import Run
from kvopt.task.seam import Encoded, Row, length_buckets, make_batch

FULL_PROMPTS_PER_BATCH = 16
OTHER_ROWS: dict[str, Literal["packed", "padded"]] = {"packed": "padded", "padded": "packed"}


@dataclass(frozen=True)
class StepCase:
    """One optimization step: the rows of a batch, their reference, and a KV context [T, L, 2, H, d] to start from."""

    base: Base
    rows: Sequence[Row]
    reference: Reference
    tensor: Tensor


@dataclass(frozen=True)
class ScoreCase:
    """Text contexts to score on ``encoded`` rows (those of the original template) against their reference."""

    base: Base
    contexts: Sequence[TextContext]
    encoded: Encoded
    reference: Reference


def bench_step(
    config: Config,
    base_dir: Path,
    *,
    tokens: int = 64,
    batch_size: int = 16,
    repeats: int = 3,
    seconds: float | None = None,
) -> list[Variant]:
    """One step (forward, backward) on a KV context: ours against PEFT's CARTRIDGE with a full-logits KL, same batch.

    Ours is measured as the config says, and a second time with its rows packed where they were padded, or padded where
    they were packed, if the base can do both.

    ``seconds``: rows of the batch and repeats are as many as take about so long for all; the loading comes on top.
    """
    ours, fitted = _in_own_process(_our_step, (config, base_dir, tokens, (batch_size, repeats), seconds))
    variants = [ours]
    if ours.rows in OTHER_ROWS:
        model = config.model.model_copy(update={"attention": OTHER_ROWS[ours.rows]})
        other = config.model_copy(update={"model": model})
        variants.append(_in_own_process(_our_step, (other, base_dir, tokens, fitted, None))[0])
    return [*variants, _in_own_process(_peft_step, (config, base_dir, tokens, fitted, None))[0]]


def bench_score(
    config: Config, base_dir: Path, *, mutations: int = 8, rows: int = 64, seconds: float | None = None
) -> list[Variant]:
    """Scoring text mutations on rows: a prefix for each, then bodies, against batched full prompts.

    ``seconds``: mutations and rows are as many as take about so long for both; the loading comes on top.
    """
    ours, fitted = _in_own_process(_our_scores, (config, base_dir, (mutations, rows), seconds))
    return [ours, _in_own_process(_naive_scores, (config, base_dir, fitted, None))[0]]


Measured = tuple[Variant, tuple[int, int]]
"""A variant, and the sizes that it was measured with: (rows, repeats) of a step, (mutations, rows) of scores."""

NAIVE = 3.0
"""What scoring full prompts takes, in ours; and a step of PEFT's, about half of that."""


def _in_own_process(function: Callable[..., Measured], job: tuple[Any, ...]) -> Measured:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, job)


# ---- one step


def step_case(base: Base, prefix: Prefix, encoded: Encoded, folder: Path, *, tokens: int, batch_size: int) -> StepCase:
    """The first ``batch_size`` rows of ``encoded``, after ``prefix``; the reference is stored in ``folder``."""
    rows = encoded.rows[:batch_size]
    reference = build_reference(base, prefix, Encoded(encoded.prefix, tuple(rows)), folder)
    tensor = initial_tensor(Init("strided").start, StartTask(base, "bench", "kv", tokens, encoded.prefix))
    return StepCase(base, rows, reference, tensor)


def our_step(case: StepCase, repeats: int) -> Variant:
    """Bodies after the learned prefix, and the divergence op."""

    def step() -> float:
        leaf = case.tensor.clone().requires_grad_(True)
        loss = context_loss(case.base, "kv", leaf, case.rows, case.reference)
        loss.backward()
        return float(loss.detach())

    bare = products(
        case.base,
        sum(len(row) - 1 for row in case.rows),
        sum(len(row.gold) for row in case.rows),
        head_products=3,
        backward=True,
    )
    rows = rows_stand(case)
    name = f"kvopt, {rows} rows" if rows else "kvopt"
    result = measured(name, step, case.base.device, repeats, before=reset_peak(case.base.device), floor=bare)
    return replace(result, rows=rows)


def rows_stand(case: StepCase) -> str:
    """How the step's rows stand after the prefix: packed, padded, or nothing where the base can only be padded."""
    base = case.base
    if not (base.capability.packs or base.capability.flex):
        return ""
    batch = make_batch(case.rows, range(len(case.rows)))
    return "padded" if packing_for(base, batch, len(case.tensor)) is None else "packed"


def peft_step(case: StepCase, repeats: int) -> Variant:
    """PEFT's CARTRIDGE over the same model, all logits, and a plain KL on the gold tokens."""
    from einops import rearrange
    from peft import CartridgeConfig, get_peft_model

    base, rows = case.base, case.rows
    before = reset_peak(base.device)
    batch = make_batch(rows, range(len(rows))).to(base.device)
    head = base.model.get_output_embeddings()
    with torch.no_grad():
        teacher = head(case.reference.hidden([row.example_id for row in rows]).to(base.device))
    settings = CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(case.tensor), num_frozen_tokens=1)
    model: Any = get_peft_model(base.model, settings)
    model.prompt_encoder["default"].load_prompt_embeddings(rearrange(case.tensor, "t l two h d -> t (l two h d)"))

    def step() -> float:
        model.zero_grad()
        logits = model(input_ids=batch.ids, attention_mask=batch.mask.long()).logits
        logits = logits[batch.predicts[:, 0], batch.predicts[:, 1]]
        student, target = log_softmax(logits.float(), -1), log_softmax(teacher.float(), -1)
        loss = kl_div(student, target, reduction="sum", log_target=True) / len(student)
        loss.backward()
        return float(loss.detach())

    return measured("PEFT CARTRIDGE, full logits", step, base.device, repeats, before=before)


def _our_step(config: Config, base_dir: Path, tokens: int, sizes: tuple[int, int], seconds: float | None) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        make = _steps_of(config, base_dir, folder, tokens)
        rows, repeats = sizes
        if seconds is not None:
            few = make(min(2, rows))
            row_seconds = our_step(few, 1).seconds / len(few.rows)
            share = 3 + NAIVE / 2  # in steps: packed, padded, the bare products, PEFT's
            repeats = repeats if fitting_rows(rows, row_seconds, repeats * share, seconds) == rows else 1
            rows = fitting_rows(rows, row_seconds, (repeats + 1) * share, seconds)
        case = make(rows)
        return replace(our_step(case, repeats), size=_step_size(case, repeats)), (rows, repeats)


def _peft_step(config: Config, base_dir: Path, tokens: int, sizes: tuple[int, int], seconds: float | None) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        case = _steps_of(config, base_dir, folder, tokens)(sizes[0])
        return replace(peft_step(case, sizes[1]), size=_step_size(case, sizes[1])), sizes


def _step_size(case: StepCase, repeats: int) -> str:
    return f"{len(case.rows)} rows, {len(case.tensor)} slots, median of {repeats}"


def _steps_of(config: Config, base_dir: Path, folder: str, tokens: int) -> Callable[[int], StepCase]:
    """A step of so many rows."""
    run = _prepared(config, base_dir, folder)
    task = run.task()
    prefix, where = task.original.prefix(task.base), run.directory / "bench"

    def make(rows: int) -> StepCase:
        place = where / str(rows)
        return step_case(task.base, prefix, task.rows("train"), place, tokens=tokens, batch_size=rows)

    return make


def _prepared(config: Config, base_dir: Path, folder: str) -> Run:
    run = Run(config, base_dir, Path(folder), say=lambda line: None, bars=False)
    run.directory.path.mkdir(parents=True, exist_ok=True)
    return run


# ---- scores


def our_scores(case: ScoreCase, repeats: int = 1) -> Variant:
    """One prefix for each context, then the bodies after it."""

    def score(context: TextContext) -> Tensor:
        return score_tokens(case.base, context, case.encoded, case.reference).kl.mean()

    def work() -> float:
        return float(torch.stack([score(context) for context in case.contexts]).mean())

    device = case.base.device
    return measured(
        "kvopt: one prefix, bodies",
        work,
        device,
        repeats,
        before=reset_peak(device),
        warm=lambda: score(case.contexts[0]),
        floor=_score_products(case),
    )


def _score_products(case: ScoreCase) -> Callable[[], None]:
    """Each context's prefix once and its bodies after it, two products of the head."""
    bodies = [context.bodies(case.encoded) for context in case.contexts]
    gold = sum(body.gold_tokens for body in bodies)
    tokens = sum(len(body.prefix) + sum(len(row) - 1 for row in body.rows) for body in bodies)
    share = len(bodies)  # in as many parts, so that no part is larger than what a context really runs
    part = products(case.base, tokens // share, gold // share, head_products=2, backward=False)

    def work() -> None:
        for _ in range(share):
            part()

    return work


def naive_scores(case: ScoreCase, repeats: int = 1) -> Variant:
    """The whole prompt of every pair, in batches of similar length."""
    base, original = case.base, _full_rows(case.encoded)

    def work() -> float:
        teacher = _gold_states(base, original)
        total, count = 0.0, 0
        for context in case.contexts:
            changed = _full_rows(context.bodies(case.encoded))
            for index in length_buckets(changed, FULL_PROMPTS_PER_BATCH):
                rows = [changed[i] for i in index]
                states = _gold_states(base, rows)
                for row in rows:
                    kl = _plain_kl(base, teacher[row.example_id], states[row.example_id])
                    total, count = total + float(kl.sum()), count + len(kl)
        return total / count

    def warm() -> object:
        return _gold_states(base, original[:FULL_PROMPTS_PER_BATCH])

    name = "plain transformers: full prompts"
    return measured(name, work, base.device, repeats, before=reset_peak(base.device), warm=warm)


def _our_scores(config: Config, base_dir: Path, sizes: tuple[int, int], seconds: float | None) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        make = _scores_of(config, base_dir, folder, sizes[0])
        mutations, rows = sizes
        if seconds is not None:
            few = make(1, min(4, rows))
            pair_seconds = our_scores(few).seconds / len(few.encoded.rows)
            mutations, rows = fitting_scores(mutations, rows, pair_seconds, 2 + NAIVE, seconds)
        case = make(mutations, rows)
        return replace(our_scores(case), size=_score_size(case)), (mutations, rows)


def _naive_scores(config: Config, base_dir: Path, sizes: tuple[int, int], seconds: float | None) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        case = _scores_of(config, base_dir, folder, sizes[0])(*sizes)
        return replace(naive_scores(case), size=_score_size(case)), sizes


def _score_size(case: ScoreCase) -> str:
    return f"{len(case.contexts)} mutations, {len(case.encoded.rows)} rows"


def _scores_of(config: Config, base_dir: Path, folder: str, most: int) -> Callable[[int, int], ScoreCase]:
    """Scores of so many mutations, at most ``most``, on so many rows."""
    settings = config.mutations.model_copy(update={"count": most, "operators": ("structure", "syntax", "lexical")})
    run = _prepared(config.model_copy(update={"mutations": settings}), base_dir, folder)
    task = run.task()
    encoded, contexts = task.rows("validation"), list(run.mutation_contexts().values())

    def make(mutations: int, rows: int) -> ScoreCase:
        some, where = Encoded(encoded.prefix, encoded.rows[:rows]), run.directory / "bench" / str(rows)
        reference = build_reference(task.base, task.original.prefix(task.base), some, where)
        return ScoreCase(task.base, contexts[:mutations], some, reference)

    return make


def _full_rows(encoded: Encoded) -> list[Row]:
    return [Row(row.example_id, (*encoded.prefix, *row.body), row.gold) for row in encoded.rows]


@torch.no_grad()
def _gold_states(base: Base, rows: Sequence[Row]) -> dict[str, Tensor]:
    """Full prompts through the model in batches; hidden states of gold positions by example."""
    states: dict[str, Tensor] = {}
    for index in length_buckets(rows, FULL_PROMPTS_PER_BATCH):
        batch = make_batch(rows, index).to(base.device)
        hidden = base.backbone(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False).last_hidden_state
        parts = hidden[batch.predicts[:, 0], batch.predicts[:, 1]].split([len(rows[i].gold) for i in index])
        states |= {rows[i].example_id: part for i, part in zip(index, parts, strict=True)}
    return states


@torch.no_grad()
def _plain_kl(base: Base, teacher: Tensor, student: Tensor) -> Tensor:
    """Logits in the model's dtype, log-softmaxes and KL in float32."""
    log_p, log_q = (log_softmax(base.model.get_output_embeddings()(h).float(), -1) for h in (teacher, student))
    return (log_p.exp() * (log_p - log_q)).sum(-1)
