"""``kvopt bench score`` and ``kvopt bench step``: what the shared prefix and the divergence op buy, in one run.

Each variant runs in a process of its own, in turn, so that its peak memory is its own; times are medians.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from kvopt.base.loading import Base
from kvopt.config.contexts import Init
from kvopt.config.document import Config
from kvopt.contexts import TextContext
from kvopt.kernels.memory import peak_resident
from kvopt.learn.descent import context_loss
from kvopt.learn.start_task import StartTask, initial_tensor
from kvopt.measure.reference import Reference, build_reference
from kvopt.measure.score import score_tokens
from kvopt.run.run import Run
from kvopt.task.seam import Encoded, Row, length_buckets, make_batch


@dataclass(frozen=True)
class Variant:
    """One row of a benchmark: median seconds, peak resident memory of its process, and its KL to compare."""

    name: str
    seconds: float
    peak_bytes: int
    value: float


def bench_step(
    config: Config, base_dir: Path, *, tokens: int = 64, batch_size: int = 16, repeats: int = 3
) -> list[Variant]:
    """One step (forward, backward) on a KV context: ours against PEFT's CARTRIDGE with a full-logits KL, same batch."""
    job = (config, base_dir, tokens, batch_size, repeats)
    return [_in_own_process(function, job) for function in (_our_step, _peft_step)]


def bench_score(config: Config, base_dir: Path, *, mutations: int = 8, rows: int = 64) -> list[Variant]:
    """Scoring text mutations on rows: a prefix for each, then bodies, against batched full prompts."""
    job = (config, base_dir, mutations, rows)
    return [_in_own_process(function, job) for function in (_our_scores, _naive_scores)]


def _in_own_process(function: Callable[..., Variant], job: tuple[Any, ...]) -> Variant:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, job)


def _timed(name: str, work: Callable[[], float], repeats: int, warm: bool = True) -> Variant:
    if warm:
        work()
    seconds, value = [], 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        value = work()
        seconds.append(time.perf_counter() - start)
    return Variant(name, statistics.median(seconds), peak_resident(), value)


def _prepared(config: Config, base_dir: Path, folder: str) -> Run:
    run = Run(config, base_dir, Path(folder), say=lambda line: None, bars=False)
    run.directory.path.mkdir(parents=True, exist_ok=True)
    return run


def _step_inputs(run: Run, tokens: int, batch_size: int) -> tuple[Sequence[Row], Reference, Tensor]:
    task = run.task()
    rows = task.rows("train").rows[:batch_size]
    encoded = Encoded(task.encoded.prefix, tuple(rows))
    reference = build_reference(task.base, task.original.prefix(task.base), encoded, run.directory / "bench")
    start = StartTask(task.base, "bench", "kv", tokens, task.encoded.prefix)
    return rows, reference, initial_tensor(Init("strided").start, start)


def _our_step(config: Config, base_dir: Path, tokens: int, batch_size: int, repeats: int) -> Variant:
    with tempfile.TemporaryDirectory() as folder:
        run = _prepared(config, base_dir, folder)
        rows, reference, tensor = _step_inputs(run, tokens, batch_size)

        def step() -> float:
            leaf = tensor.clone().requires_grad_(True)
            loss = context_loss(run.load_base(), "kv", leaf, rows, reference)
            loss.backward()
            return float(loss.detach())

        return _timed("kvopt", step, repeats)


def _peft_step(config: Config, base_dir: Path, tokens: int, batch_size: int, repeats: int) -> Variant:
    from einops import rearrange
    from peft import CartridgeConfig, get_peft_model

    with tempfile.TemporaryDirectory() as folder:
        run = _prepared(config, base_dir, folder)
        rows, reference, tensor = _step_inputs(run, tokens, batch_size)
        batch = make_batch(rows, range(len(rows))).to(run.load_base().device)
        with torch.no_grad():
            teacher = run.load_base().model.get_output_embeddings()(reference.hidden([row.example_id for row in rows]))
        settings = CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens, num_frozen_tokens=1)
        model: Any = get_peft_model(run.load_base().model, settings)
        flat = rearrange(tensor, "t l two h d -> t (l two h d)")
        model.prompt_encoder["default"].load_prompt_embeddings(flat)

        def step() -> float:
            model.zero_grad()
            logits = model(input_ids=batch.ids, attention_mask=batch.mask.long()).logits
            logits = logits[batch.predicts[:, 0], batch.predicts[:, 1]]
            student, target = log_softmax(logits.float(), -1), log_softmax(teacher.float(), -1)
            loss = kl_div(student, target, reduction="sum", log_target=True) / len(student)
            loss.backward()
            return float(loss.detach())

        return _timed("PEFT CARTRIDGE, full logits", step, repeats)


def _contexts(run: Run, mutations: int, rows: int) -> tuple[list[TextContext], Encoded]:
    found = list(run.mutation_contexts().values())[:mutations]
    encoded = run.task().rows("validation")
    return found, Encoded(encoded.prefix, encoded.rows[:rows])


def _rules_only(config: Config, mutations: int) -> Config:
    settings = config.mutations.model_copy(update={"count": mutations, "operators": ("structure", "syntax", "lexical")})
    return config.model_copy(update={"mutations": settings})


def _our_scores(config: Config, base_dir: Path, mutations: int, rows: int) -> Variant:
    with tempfile.TemporaryDirectory() as folder:
        run = _prepared(_rules_only(config, mutations), base_dir, folder)
        contexts, encoded = _contexts(run, mutations, rows)
        reference = run.reference()

        def work() -> float:
            scores = [score_tokens(run.load_base(), context, encoded, reference).kl.mean() for context in contexts]
            return float(torch.stack(scores).mean())

        score_tokens(run.load_base(), contexts[0], encoded, reference)
        return _timed("kvopt: one prefix, bodies", work, 1, warm=False)


def _naive_scores(config: Config, base_dir: Path, mutations: int, rows: int) -> Variant:
    with tempfile.TemporaryDirectory() as folder:
        run = _prepared(_rules_only(config, mutations), base_dir, folder)
        contexts, encoded = _contexts(run, mutations, rows)
        original = _full_rows(encoded)

        def work() -> float:
            teacher = _gold_states(run.load_base(), original)
            total, count = 0.0, 0
            for context in contexts:
                changed = _full_rows(context.bodies(encoded))
                for index in length_buckets(changed, 16):
                    rows = [changed[i] for i in index]
                    states = _gold_states(run.load_base(), rows)
                    for row in rows:
                        kl = _plain_kl(run.load_base(), teacher[row.example_id], states[row.example_id])
                        total, count = total + float(kl.sum()), count + len(kl)
            return total / count

        return _timed("plain transformers: full prompts", work, 1, warm=False)


def _full_rows(encoded: Encoded) -> list[Row]:
    return [Row(row.example_id, (*encoded.prefix, *row.body), row.gold) for row in encoded.rows]


@torch.no_grad()
def _gold_states(base: Base, rows: Sequence[Row]) -> dict[str, Tensor]:
    """Full prompts through the model in batches of 16; hidden states of gold positions by example."""
    states: dict[str, Tensor] = {}
    for index in length_buckets(rows, 16):
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


def as_json(title: str, variants: Sequence[Variant]) -> dict[str, Any]:
    """The result as one document; ratios are of the last variant to the first."""
    first, last = variants[0], variants[-1]
    return {
        "benchmark": title,
        "threads": torch.get_num_threads(),
        "variants": [vars(v) for v in variants],
        "time_ratio": last.seconds / first.seconds,
        "peak_memory_ratio": last.peak_bytes / first.peak_bytes,
    }
