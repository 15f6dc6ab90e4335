"""Bases with fewer bits a weight, by the real libraries, where they are installed; and the second of two GPUs."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from kvopt.base.loading import Base, load_base
from kvopt.config.contexts import ContextConfig, Init
from kvopt.config.model import ModelConfig
from kvopt.errors import InputError
from kvopt.kernels import KLOptions, linear_kl
from kvopt.learning.descent import Descent, differentiated_loss, optimize
from kvopt.learning.start_task import StartTask, initial_tensor
from kvopt.train.student import lora_student
from tests.gpu.device import DEVICE, ON_GPU, problem
from tests.tasks import Task, make_task
from tests.tiny import save_tiny

pytestmark = pytest.mark.gpu


def needs(library: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(library) is None, reason=f"{library} is not installed")


TORCHAO = {"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig"}
METHODS = [
    pytest.param("nf4", marks=needs("bitsandbytes")),
    pytest.param("int8", marks=needs("bitsandbytes")),
    pytest.param(TORCHAO, marks=needs("torchao"), id="torchao"),
]


def base_of(folder: Path, quantization: Any = None, device: str = str(DEVICE)) -> Base:
    """A tiny base whose layers are wide enough for blocks of 64 weights."""
    if not folder.is_dir():
        save_tiny(folder, "llama", "chatml", hidden_size=64, intermediate_size=128)
    dtype = "bfloat16" if ON_GPU or quantization else "float32"
    return load_base(ModelConfig(base=str(folder), dtype=dtype, device=device, quantization=quantization))


def learned(task: Task, **more: Any) -> Descent:
    rows = task.encoded.rows
    start = initial_tensor(Init("strided").start, StartTask(task.base, "c", "kv", 6, task.encoded.prefix))
    config = ContextConfig(name="c", tokens=6, steps=8, batch_size=4, learning_rate=0.02, eval_every=4, **more)
    return optimize(task.base, start, config, rows[:8], rows[8:], task.reference)


@pytest.mark.parametrize("method", METHODS)
def test_a_context_is_learned_through_a_quantized_base(tmp_path: Path, method: Any) -> None:
    base = base_of(tmp_path / "model", method)
    assert base.capability.no_gradient is None
    assert base.quantized_by in ("bitsandbytes", "torchao")
    assert base.identity["quantization"]
    assert {p.device.type for p in base.model.parameters()} == {DEVICE.type}
    task = make_task(base, tmp_path / "reference")
    history = learned(task).history
    assert history[-1]["held_out_kl"] < history[0]["held_out_kl"]
    before = [p.data_ptr() for p in base.model.parameters()]
    student = lora_student(base, "s", targets=["q_proj"])
    assert all(math.isfinite(float(p.detach().float().sum())) for p in student.trainable().values())
    assert [p.data_ptr() for p in base.model.parameters()] == before


@needs("torchao")
def test_one_without_gradients_is_refused_by_name(tmp_path: Path) -> None:
    dynamic = {"quant_method": "torchao", "quant_type": "Int8DynamicActivationInt8WeightConfig"}
    base = base_of(tmp_path / "model", dynamic)
    with pytest.raises(InputError, match="torchao gives no gradient by the input of"):
        learned(make_task(base, tmp_path / "reference"))


def test_micro_batches_have_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    task = make_task(base_of(tmp_path / "model"), tmp_path / "reference")
    start = initial_tensor(Init("strided").start, StartTask(task.base, "c", "kv", 6, task.encoded.prefix))
    gradients = []
    for at_once in (None, 3):
        leaf = start.clone().requires_grad_(True)
        rows = task.encoded.rows[:8]
        differentiated_loss(task.base, "kv", leaf, rows, task.reference, leaf=leaf, at_once=at_once)
        gradients.append(leaf.grad)
    whole, parts = gradients
    assert whole is not None
    assert parts is not None
    assert float((whole - parts).norm() / whole.norm()) < (2e-2 if ON_GPU else 1e-5)


@pytest.mark.skipif(not ON_GPU or torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu_does_all_that_the_first_does(tmp_path: Path) -> None:
    first = learned(make_task(base_of(tmp_path / "model", device="cuda:0"), tmp_path / "first"))
    drawn = torch.cuda.get_rng_state(0)
    base = base_of(tmp_path / "model", device="cuda:1")
    assert {p.device for p in base.model.parameters()} == {torch.device("cuda", 1)}
    torch.cuda.set_device(0)  # nothing rests on the current device
    second = learned(make_task(base, tmp_path / "second"))
    torch.testing.assert_close(second.tensor, first.tensor, rtol=2e-2, atol=2e-3)
    student = lora_student(base, "s", targets=["q_proj"])
    assert {p.device for p in student.trainable().values()} == {torch.device("cuda", 1)}
    assert torch.equal(torch.cuda.get_rng_state(0), drawn)
    p = problem(0.1, torch.bfloat16)
    there = [t.to("cuda:1") for t in (p.candidate, p.reference)]
    for backend in ("triton-rows", "triton-store-free"):
        options = KLOptions(backend=backend)
        here = linear_kl(p.candidate, p.reference, p.head, options=options).kl
        head = type(p.head)(p.head.weight.to("cuda:1"))
        moved = linear_kl(there[0], there[1], head, options=options).kl
        torch.testing.assert_close(moved.cpu(), here.cpu(), rtol=1e-3, atol=1e-5)
