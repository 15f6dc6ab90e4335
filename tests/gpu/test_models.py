"""Everything that runs a model, on the device, against the same on the CPU: reference, scores, initialisers,
optimization, a student's training, answers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvopt.base.generate import generate
from kvopt.base.prefix import gold_states, prefill
from kvopt.config.contexts import ContextConfig, Init
from kvopt.contexts import KVContext, SoftContext, load_context, save_context
from kvopt.kernels import KLOptions
from kvopt.learning import descent_state
from kvopt.learning.descent import Descent, context_loss, optimize
from kvopt.learning.start_task import StartTask, initial_tensor
from kvopt.measure.moments import StoredMoments
from kvopt.measure.score import TokenScores, score_tokens
from kvopt.train.trainer import Trained, train_student
from tests.gpu.device import DEVICE, base_on_device
from tests.kernels.cases import linear_scores64, relative
from tests.tasks import OTHER, Task, make_task, template_for
from tests.tiny import MODELS, tiny_base
from tests.train.pools import job, pool

pytestmark = pytest.mark.gpu
KINDS = ["kv", "soft"]


@dataclass(frozen=True)
class Pair:
    """The same task on the device and on the CPU, both in float32."""

    here: Task
    cpu: Task


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    kind = request.param
    here = make_task(base_on_device(kind), tmp_path_factory.mktemp(f"{kind}-device"))
    return Pair(here, make_task(tiny_base(kind), tmp_path_factory.mktemp(f"{kind}-cpu")))


def ids(task: Task) -> list[str]:
    return [row.example_id for row in task.encoded.rows]


def start(task: Task, kind: str, init: str = "strided") -> Tensor:
    given = StartTask(task.base, "c", kind, 6, task.encoded.prefix, task.encoded.rows[:4])  # type: ignore[arg-type]
    return initial_tensor(Init(init).start, given)


def learn(task: Task, kind: str, **more: object) -> Descent:
    config = ContextConfig(name="c", kind=kind, tokens=6, steps=6, batch_size=4, learning_rate=0.02, eval_every=2)  # type: ignore[arg-type]
    rows = task.encoded.rows
    return optimize(task.base, start(task, kind), config, rows[:8], rows[8:], task.reference, **more)  # type: ignore[arg-type]


def gradient(task: Task, kind: str) -> Tensor:
    tensor = start(task, kind).requires_grad_(True)
    context_loss(task.base, kind, tensor, task.encoded.rows[:5], task.reference).backward()
    assert tensor.grad is not None
    return tensor.grad.cpu()


def other_scores(task: Task) -> TokenScores:
    return score_tokens(task.base, task.text("other", template_for(task.base, OTHER)), task.encoded, task.reference)


def held_out(learned: Descent) -> list[float]:
    return [point["held_out_kl"] for point in learned.history]


def test_the_base_is_where_it_was_asked_for(pair: Pair) -> None:
    assert pair.here.base.device.type == DEVICE.type
    assert {p.device.type for p in pair.here.base.model.parameters()} == {DEVICE.type}
    assert pair.here.base.capability == pair.cpu.base.capability


def test_the_reference_is_the_cpus(pair: Pair) -> None:
    assert relative(pair.here.reference.hidden(ids(pair.here)), pair.cpu.reference.hidden(ids(pair.cpu))) <= 1e-4


def test_scores_are_the_cpus(pair: Pair) -> None:
    ours, theirs = other_scores(pair.here), other_scores(pair.cpu)
    assert theirs.kl.mean() > 1e-4
    torch.testing.assert_close(ours.kl, theirs.kl, rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(ours.nll, theirs.nll, rtol=1e-3, atol=1e-4)
    assert (ours.agree == theirs.agree).float().mean() >= 0.99
    same = score_tokens(pair.here.base, pair.here.original, pair.here.encoded, pair.here.reference, batch_size=3)
    assert same.kl.abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_scores_are_those_of_float64_on_the_same_states(dtype: str, tmp_path: Path) -> None:
    task = make_task(base_on_device("llama", dtype), tmp_path)
    other = task.text("other", template_for(task.base, OTHER))
    prefix, rows = other.prefix(task.base), other.encoded.rows
    ours = score_tokens(task.base, other, task.encoded, task.reference)
    exact: list[Tensor] = [torch.empty(0)] * len(rows)
    for states in gold_states(task.base, prefix, rows, batch_size=16):
        stored = task.reference.hidden([rows[i].example_id for i in states.rows]).to(DEVICE)
        kl = linear_scores64(states.hidden, stored, task.base.head, states.gold, KLOptions()).kl
        for i, part in states.split(kl.cpu()):
            exact[i] = part
    assert ((ours.kl - torch.cat(exact)) / torch.cat(exact)).abs().max() <= 1e-2


@pytest.mark.parametrize("init", ["template", "strided", "random-text", "random"])
def test_initial_contexts_are_the_cpus(pair: Pair, init: str) -> None:
    ours, theirs = start(pair.here, "kv", init), start(pair.cpu, "kv", init)
    assert ours.device.type == DEVICE.type
    assert relative(ours.cpu(), theirs) <= 1e-3


def test_attention_matching_is_as_near_as_the_cpus(pair: Pair) -> None:
    """Which of two equally good slots it keeps may differ."""
    kl = []
    for task in (pair.here, pair.cpu):
        tensor = start(task, "kv", "matched")
        assert tensor.device.type == task.base.device.type
        kl.append(float(score_tokens(task.base, KVContext("c", tensor), task.encoded, task.reference).kl.mean()))
    assert kl[0] == pytest.approx(kl[1], rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_by_a_context_is_the_cpus(pair: Pair, kind: str) -> None:
    assert relative(gradient(pair.here, kind), gradient(pair.cpu, kind)) <= 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_optimization_goes_the_cpus_way(pair: Pair, kind: str) -> None:
    ours, theirs = learn(pair.here, kind), learn(pair.cpu, kind)
    assert min(held_out(ours)) < held_out(ours)[0]
    assert held_out(ours) == pytest.approx(held_out(theirs), rel=2e-2)
    assert ours.step == theirs.step


def test_optimization_on_stored_moments_goes_the_same_way(pair: Pair) -> None:
    moments = StoredMoments(pair.here.reference, ids(pair.here)[:8])
    moments.build(pair.here.base.head)
    ours, theirs = learn(pair.here, "kv", moments=moments), learn(pair.cpu, "kv")
    assert held_out(ours) == pytest.approx(held_out(theirs), rel=2e-2)


class _Cut(Exception):
    pass


def test_a_cut_optimization_is_taken_up_again(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descent_state, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    monkeypatch.setattr(descent_state, "WRITES_BETWEEN_CHECKPOINTS", 0.0)

    def cut(step: int, train: float | None, held_out_kl: float | None) -> None:
        if step == 3:
            raise _Cut

    checkpoint = tmp_path / "state.safetensors"
    with pytest.raises(_Cut):
        learn(pair.here, "kv", checkpoint=checkpoint, key="k", report=cut)
    steps: list[int] = []
    resumed = learn(pair.here, "kv", checkpoint=checkpoint, key="k", report=lambda step, *_: steps.append(step))
    assert steps[:2] == [3, 4], "where it goes on, and its first step"
    assert held_out(resumed) == pytest.approx(held_out(learn(pair.here, "kv")), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_context_folder_is_read_back_onto_the_device(pair: Pair, kind: str, tmp_path: Path) -> None:
    task = pair.here
    tensor = start(task, kind)
    context = KVContext("c", tensor) if kind == "kv" else SoftContext("c", tensor)
    save_context(context, tmp_path / "c", task.base)
    again = load_context(tmp_path / "c", task.base)
    ours, theirs = (score_tokens(task.base, c, task.encoded, task.reference).kl for c in (context, again))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def trained(task: Task, folder: Path, **settings: object) -> Trained:
    options = {"steps": 3, "learning_rate": 0.01, "loss": "anchored-kl"} | settings
    return train_student(job(task, folder, pool(task, "original", "kv", "soft"), **options))


def test_a_student_is_trained_as_on_the_cpu(pair: Pair, tmp_path: Path) -> None:
    ours, theirs = trained(pair.here, tmp_path / "here"), trained(pair.cpu, tmp_path / "cpu")
    assert ours.student.base.device.type == DEVICE.type
    for name in ("loss", "grad_norm"):
        assert [p[name] for p in ours.history] == pytest.approx([p[name] for p in theirs.history], rel=2e-2)


def test_a_16_bit_base_trains_a_full_and_a_lora_student(tmp_path: Path) -> None:
    task = make_task(base_on_device("llama", "bfloat16"), tmp_path / "reference")
    for method in ("lora", "full"):
        curve = [p["loss"] for p in trained(task, tmp_path / method, method=method, steps=6).history]
        assert all(map(math.isfinite, curve))
        assert min(curve[3:]) < curve[0]


def test_answers_are_the_cpus(pair: Pair) -> None:
    answers = []
    for task in (pair.here, pair.cpu):
        prefix = prefill(task.base, ids=torch.tensor(task.encoded.prefix, device=task.base.device))
        bodies = [row.body for row in task.encoded.rows[:5]]
        answers.append(generate(task.base, prefix, bodies, max_new_tokens=8, batch_size=3))
        drawn = [generate(task.base, prefix, bodies, max_new_tokens=4, temperature=1.0, seed=s) for s in (1, 1, 2)]
        assert drawn[0] == drawn[1]
        assert drawn[0] != drawn[2]
    assert answers[0] == answers[1]
