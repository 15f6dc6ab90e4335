"""Optimizing a context: right gradients, falling KL, exact resume, and nothing else touched."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from kvopt.base.loading import Base, enable_checkpointing
from kvopt.config.contexts import ContextConfig, Init
from kvopt.errors import KvoptError
from kvopt.learning import descent, descent_state
from kvopt.learning.descent import Descent, batch_at, context_loss, differentiated_loss, learning_rate_at, optimize
from kvopt.learning.descent_state import DescentState
from kvopt.learning.start_task import StartTask, initial_tensor
from kvopt.measure.score import TokenScores, score_prefix
from tests.tasks import Task, make_task
from tests.tiny import MODELS, tiny_base


@pytest.fixture(scope="module", params=MODELS)
def task(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tiny_base(request.param), tmp_path_factory.mktemp(request.param))


def start(task: Task, kind: str, tokens: int = 6) -> Tensor:
    return initial_tensor(Init("strided").start, StartTask(task.base, "c", kind, tokens, task.encoded.prefix))  # type: ignore[arg-type]


def learn(task: Task, config: ContextConfig, **more: object) -> Descent:
    rows = task.encoded.rows
    return optimize(task.base, start(task, config.kind), config, rows[:8], rows[8:], task.reference, **more)  # type: ignore[arg-type]


def loss(task: Task, kind: str, tensor: Tensor) -> Tensor:
    return context_loss(task.base, kind, tensor, task.encoded.rows[:5], task.reference)


def gradient(task: Task, kind: str, tensor: Tensor) -> Tensor:
    tensor = tensor.clone().requires_grad_(True)
    return torch.autograd.grad(loss(task, kind, tensor), tensor)[0]


@pytest.mark.parametrize("kind", ["kv", "soft"])
def test_the_gradient_is_that_of_finite_differences(task: Task, kind: str) -> None:
    tensor = start(task, kind)
    slope = gradient(task, kind, tensor)
    generator = torch.Generator().manual_seed(3)
    for direction in (slope / slope.norm(), slope.sign() * torch.rand(slope.shape, generator=generator)):
        unit = direction / direction.norm()
        step = 0.02 * float(tensor.norm()) / math.sqrt(tensor.numel())
        ahead, behind = (float(loss(task, kind, tensor + s * step * unit)) for s in (1, -1))
        expected = float((slope * unit).sum())
        assert expected > 0
        assert (ahead - behind) / (2 * step) == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("kind", ["kv", "soft"])
def test_gradient_checkpointing_changes_no_gradient(task: Task, kind: str) -> None:
    tensor = start(task, kind)
    plain = gradient(task, kind, tensor)
    model = task.base.model
    enable_checkpointing(model)
    try:
        assert any(getattr(m, "gradient_checkpointing", False) and m.training for m in model.modules())
        checkpointed = gradient(task, kind, tensor)
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
    torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", ["kv", "soft"])
@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_micro_batches_give_the_gradient_of_the_whole_batch(task: Task, kind: str, at_once: int) -> None:
    rows = task.encoded.rows[:5]
    assert len({len(row.gold) for row in rows}) > 1, "rows of unlike weight"
    tensor = start(task, kind)
    whole = gradient(task, kind, tensor)
    leaf = tensor.clone().requires_grad_(True)
    value = differentiated_loss(task.base, kind, 1.0 * leaf, rows, task.reference, leaf=leaf, at_once=at_once)
    assert value == pytest.approx(loss(task, kind, tensor).item(), rel=1e-5)
    torch.testing.assert_close(leaf.grad, whole, rtol=1e-4, atol=1e-6 * float(whole.abs().max()))


def test_a_micro_batch_is_a_matter_of_memory_only(llama: Base, tmp_path: Path) -> None:
    task = make_task(llama, tmp_path)
    settings = {"name": "c", "steps": 3, "batch_size": 4, "eval_every": 3, "kind": "soft"}
    whole, parts = (learn(task, ContextConfig(**settings, micro_batch_size=size)) for size in (None, 1))  # type: ignore[arg-type]
    torch.testing.assert_close(parts.tensor, whole.tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["kv", "soft"])
def test_kl_falls_frozen_slots_stay_and_the_base_does_not_change(task: Task, kind: str) -> None:
    before = {name: p.clone() for name, p in task.base.model.named_parameters()}
    config = ContextConfig(
        name="c",
        kind=kind,
        tokens=6,
        steps=30,
        batch_size=4,
        learning_rate=0.02,
        eval_every=5,
        frozen=2,
    )  # type: ignore[arg-type]
    learned = learn(task, config)
    curve = [point["held_out_kl"] for point in learned.history]
    assert min(curve) < 0.95 * curve[0]
    assert learned.history[0]["step"] == 0
    assert [point["step"] for point in learned.history] == list(range(0, 31, 5))
    assert torch.equal(learned.tensor[:2], start(task, kind)[:2])
    assert not torch.equal(learned.tensor[2:], start(task, kind)[2:])
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in task.base.model.named_parameters())


@pytest.mark.parametrize(("rate", "patience"), [(10, 1), (30, 2), (300, 1)])
def test_the_state_kept_is_the_best_on_held_out_rows(llama: Base, tmp_path: Path, rate: float, patience: int) -> None:
    task = make_task(llama, tmp_path)
    config = ContextConfig(
        name="c", tokens=6, steps=40, batch_size=2, learning_rate=rate, eval_every=4, patience=patience
    )
    learned = learn(task, config)
    best = min(learned.history, key=lambda point: point["held_out_kl"])
    assert learned.step == best["step"] == (4 if rate == 10 else 0)
    assert learned.steps == learned.step + 4 * patience < 40  # patience ended it
    kept = context_loss(llama, "kv", learned.tensor, task.encoded.rows[8:], task.reference)
    assert float(kept) == pytest.approx(best["held_out_kl"], rel=1e-4)


@pytest.mark.parametrize(("kind", "stop"), [("kv", 1), ("kv", 3), ("kv", 4), ("kv", 7), ("soft", 3), ("soft", 4)])
def test_a_run_that_is_cut_and_continued_ends_in_the_same_bytes(
    llama: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, stop: int
) -> None:
    monkeypatch.setattr(descent_state, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    monkeypatch.setattr(descent_state, "WRITES_BETWEEN_CHECKPOINTS", 0.0)
    task = make_task(llama, tmp_path / "reference")
    settings = {"kind": kind, "optimizer": "muon" if kind == "soft" else "adamw", "steps": 8, "batch_size": 5}
    config = ContextConfig(name="c", tokens=6, learning_rate=0.02, eval_every=2, **settings)  # type: ignore[arg-type]
    whole = learn(task, config, seed=5)

    class Cut(Exception):
        pass

    def cut(step: int, train: float | None, held_out: float | None) -> None:
        if step == stop:
            raise Cut

    checkpoint = tmp_path / "state.safetensors"
    with pytest.raises(Cut):
        learn(task, config, seed=5, checkpoint=checkpoint, key="k", report=cut)
    seen: list[int] = []
    told: list[tuple[int, float | None, float | None]] = []
    resumed = learn(task, config, seed=5, checkpoint=checkpoint, key="k", report=lambda *point: told.append(point))
    assert told[0] == (stop, None, whole.history[stop // 2]["held_out_kl"]), "it is told at once where it goes on"
    assert [(step, held_out) for step, _, held_out in told[1:]] == [
        (step, None if step % 2 else whole.history[step // 2]["held_out_kl"]) for step in range(stop + 1, 9)
    ]
    assert all(train is not None for _, train, _ in told[1:])
    assert torch.equal(resumed.tensor, whole.tensor)
    assert resumed.history == whole.history
    seen.clear()
    learn(task, config, seed=5, checkpoint=checkpoint, key="another job", report=lambda step, *_: seen.append(step))
    assert seen[0] == 0


def test_checkpoints_are_as_far_apart_as_a_minute_or_ten_times_their_writing(
    llama: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes 20 seconds here; the first checkpoints are written at once, the later ones in 30 seconds."""
    clock, written = [0.0], []

    def save(state: DescentState, path: Path, key: str) -> None:
        written.append(state.step)
        clock[0] += 0 if len(written) < 3 else 30

    monkeypatch.setattr(descent_state.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(DescentState, "save", save)

    def report(step: int, *_: object) -> None:
        clock[0] += 20

    config = ContextConfig(name="c", tokens=6, steps=32, batch_size=2, eval_every=1)
    learn(make_task(llama, tmp_path), config, checkpoint=tmp_path / "state", key="k", report=report)
    assert written == [4, 7, 10, 25]


@pytest.mark.parametrize("at_once", [None, 2])
def test_what_was_learned_is_kept_where_memory_runs_out(
    llama: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int | None
) -> None:
    task, checkpoint = make_task(llama, tmp_path / "reference"), tmp_path / "state.safetensors"
    config = ContextConfig(name="c", tokens=6, steps=8, batch_size=4, eval_every=2, micro_batch_size=at_once)
    whole = learn(task, config, seed=5)
    runs = itertools.count()
    scarce = descent.linear_kl

    def linear_kl(*args: object, **options: object) -> object:
        if next(runs) == (5 if at_once is None else 11):  # in the sixth step, whose gradient is half there
            raise torch.OutOfMemoryError("CUDA out of memory")
        return scarce(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(descent, "linear_kl", linear_kl)
    with pytest.raises(torch.OutOfMemoryError):
        learn(task, config, seed=5, checkpoint=checkpoint, key="k")
    steps: list[int] = []
    resumed = learn(task, config, seed=5, checkpoint=checkpoint, key="k", report=lambda step, *_: steps.append(step))
    assert steps == [5, 6, 7, 8]
    assert torch.equal(resumed.tensor, whole.tensor)
    assert resumed.history == whole.history


def test_the_start_that_was_given_is_not_written_over(task: Task) -> None:
    given = start(task, "kv")
    before = given.clone()
    rows = task.encoded.rows
    config = ContextConfig(name="c", tokens=6, steps=3, batch_size=4, learning_rate=0.02, eval_every=1)
    learned = optimize(task.base, given, config, rows[:8], rows[8:], task.reference)
    assert torch.equal(given, before)
    assert not torch.equal(learned.tensor, before)


def test_steps_of_a_soft_prompt_are_those_of_muon(llama: Base, tmp_path: Path) -> None:
    task = make_task(llama, tmp_path)
    settings = {"steps": 3, "batch_size": 4, "eval_every": 3, "clip": 1e9}
    config = ContextConfig(name="c", kind="soft", tokens=6, optimizer="muon", **settings)  # type: ignore[arg-type]
    steps = itertools.count()
    learned = learn(task, config, seed=2, choose=lambda *_: -next(steps))
    slots = start(task, "soft")
    moved, momentum = slots[1:].clone(), torch.zeros_like(slots[1:])
    for step in range(3):
        leaf = moved.clone().requires_grad_(True)
        rows = [task.encoded.rows[i] for i in batch_at(step, 8, 4, 2)]
        [slope] = torch.autograd.grad(
            context_loss(llama, "soft", torch.cat([slots[:1], leaf]), rows, task.reference), leaf
        )
        momentum = momentum.lerp(slope, 0.05)
        x = slope.lerp(momentum, 0.95)
        x = x / x.norm()
        for _ in range(5):  # Newton-Schulz towards the nearest matrix with orthonormal rows
            gram = x @ x.T
            x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
        moved = moved - learning_rate_at(step, config) * 0.2 * math.sqrt(max(x.shape)) * x
    torch.testing.assert_close(learned.tensor[1:], moved, rtol=0.02, atol=2e-4)
    with pytest.raises(ValidationError, match="muon is for soft prompts"):
        ContextConfig(name="c", kind="kv", optimizer="muon")


def test_a_diverging_run_stops_with_the_step_and_what_is_kept(llama: Base, tmp_path: Path) -> None:
    task = make_task(replace(llama, attention="padded"), tmp_path / "reference")
    config = ContextConfig(name="wild", tokens=6, steps=50, batch_size=4, learning_rate=1e20, eval_every=1, warmup=0)
    with pytest.raises(KvoptError, match=r"contexts\.wild: .* at step \d+.*lower learning_rate"):
        learn(task, config, checkpoint=tmp_path / "state.safetensors", key="k")


def plain_descent(task: Task, config: ContextConfig, seed: int) -> Tensor:
    """The steps of a config written out with torch's own clipping and AdamW, on unclipped gradients of the loss."""
    initial = start(task, config.kind)
    frozen, slots = initial[: config.frozen], initial[config.frozen :].clone().requires_grad_(True)
    adam = torch.optim.AdamW([slots], lr=config.learning_rate, weight_decay=config.weight_decay)
    for step in range(config.steps):
        rows = [task.encoded.rows[row] for row in batch_at(step, 8, config.batch_size, seed)]
        context_loss(task.base, config.kind, torch.cat([frozen, slots]), rows, task.reference).backward(inputs=[slots])
        torch.nn.utils.clip_grad_norm_([slots], config.clip)
        for group in adam.param_groups:
            group["lr"] = learning_rate_at(step, config)
        adam.step()
        adam.zero_grad()
    return torch.cat([frozen, slots.detach()])


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize(
    "settings", [{"clip": 1e-3}, {"clip": 1e3}, {"clip": 1e3, "weight_decay": 0.1}], ids=["clip", "adam", "decay"]
)
def test_steps_are_those_of_torchs_adamw_with_clipped_gradients(
    llama: Base, tmp_path: Path, settings: dict[str, float], resumed: bool
) -> None:
    task = make_task(llama, tmp_path / "reference")
    config = ContextConfig(
        name="c", tokens=6, frozen=1, steps=4, batch_size=3, learning_rate=0.05, warmup=0.5, eval_every=1, **settings
    )  # type: ignore[arg-type]
    newest = count()
    more = {"seed": 2, "choose": lambda *_: float(-next(newest)), "checkpoint": tmp_path / "state.safetensors"}

    def cut(step: int, *_: object) -> None:
        if resumed and step == 2:
            raise InterruptedError

    if resumed:
        with pytest.raises(InterruptedError):
            learn(task, config, **more, report=cut)
    learned = learn(task, config, **more)
    assert learned.step == learned.steps == 4, "the newest state is kept"
    expected = plain_descent(task, config, seed=2)
    assert (expected - start(task, "kv")).abs().max() > 0.05
    torch.testing.assert_close(learned.tensor, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("frozen", "steps"), [(10, 1), (12, 0), (20, 0)])
def test_frozen_slots_stay_however_many_there_are(llama: Base, tmp_path: Path, frozen: int, steps: int) -> None:
    task = make_task(llama, tmp_path)
    initial = start(task, "kv", tokens=12)
    config = ContextConfig(name="c", steps=1, batch_size=4, learning_rate=0.1, warmup=0, frozen=frozen)
    rows = task.encoded.rows
    newest = count()
    learned = optimize(
        llama, initial, config, rows[:8], rows[8:], task.reference, choose=lambda *_: float(-next(newest))
    )
    assert learned.steps == steps
    assert torch.equal(learned.tensor[:frozen], initial[:frozen])
    moved = (learned.tensor != initial).flatten(1).any(1)
    assert moved.tolist() == [False] * min(frozen, 12) + [True] * max(0, 12 - frozen)


def test_a_held_out_kl_that_is_not_finite_stops_with_its_step(
    llama: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(llama, tmp_path)
    measured = count()

    def scored(*given: object, **how: object) -> TokenScores:
        scores = score_prefix(*given, **how)  # type: ignore[arg-type]
        return replace(scores, kl=scores.kl * float("nan")) if next(measured) else scores

    monkeypatch.setattr(descent, "score_prefix", scored)
    config = ContextConfig(name="wild", tokens=6, steps=4, batch_size=4, eval_every=2)
    with pytest.raises(KvoptError, match=r"contexts\.wild: held-out KL is nan at step 2; lower learning_rate"):
        learn(task, config)


def test_every_epoch_visits_every_row_once() -> None:
    order = [row for step in range(7) for row in batch_at(step, 7, 3, seed=1)]
    assert sorted(order[:7]) == sorted(order[7:14]) == sorted(order[14:]) == list(range(7))
    assert order[:7] != order[7:14]


def test_the_learning_rate_rises_then_falls_to_nothing() -> None:
    config = ContextConfig(name="c", steps=100, learning_rate=1.0, warmup=0.1)
    rates = [learning_rate_at(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == rates[10] == 1.0
    assert rates == sorted(rates[:11]) + sorted(rates[11:], reverse=True)
    assert rates[-1] < 1e-3
