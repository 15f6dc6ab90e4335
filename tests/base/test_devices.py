"""Which device a name means, what it computes in, and random numbers that stay where they belong.

GPUs are fakes here: torch is told that there are some, and a tensor on one is a tensor on the CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from kvopt.base import devices
from kvopt.base.devices import automatic_dtype, choose_device, dtype_warning, has_bfloat16, seeded
from kvopt.errors import InputError
from kvopt.train.settings import stay_on


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Two CUDA devices, a Turing one and a Hopper one."""
    seen = SimpleNamespace(current=0, count=2, capability={0: (7, 5), 1: (9, 0)})
    names = {0: "Tesla T4", 1: "NVIDIA H100"}

    def index(device: Any) -> int:
        return seen.current if device is None or torch.device(device).index is None else torch.device(device).index

    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen.count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen.count)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: seen.current)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(seen, "current", index(device)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: names[index(device)])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: seen.capability[index(device)])
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(devices.torch, "empty", lambda *shape, **more: None)
    return seen


def test_a_device_has_its_index_and_becomes_the_current_one(gpus: SimpleNamespace) -> None:
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert gpus.current == 1
    assert choose_device("cuda") == torch.device("cuda", 1)
    assert choose_device("cuda:0") == choose_device("auto") == torch.device("cuda", 0)
    assert choose_device("cpu") == choose_device("cpu:0") == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("cuda:2", 2, r"model.device cuda:2: there is no such device: torch sees 2 cuda devices, cuda:0 to cuda:1"),
        ("cuda:1", 1, r"torch sees 1 cuda device, cuda:0 \(use cuda:0\)"),
        ("cuda", 0, r"model.device cuda: torch .* sees no cuda device \(use auto or cpu\)"),
        ("gpu", 2, r"model.device gpu: is no device \(give auto, cpu, cuda"),
        ("meta", 2, r"kvopt does not compute on meta \(use cpu, cuda, mps, xpu or auto\)"),
        ("xpu:1", 2, r"sees no xpu device"),
        ("mps", 2, r"sees no mps device"),
    ],
)
def test_a_device_that_is_not_there_is_one_line(gpus: SimpleNamespace, name: str, count: int, message: str) -> None:
    gpus.count = count
    with pytest.raises(InputError, match=message):
        choose_device(name)


def test_auto_takes_the_best_kind_that_is_there(gpus: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus.count = 0
    assert choose_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("mps")


def test_a_gpu_without_bfloat16_computes_in_float32_by_name(gpus: SimpleNamespace) -> None:
    turing, hopper = torch.device("cuda", 0), torch.device("cuda", 1)
    gpus.current = 1  # what is asked for counts, not what is current
    assert automatic_dtype(turing) == torch.float32
    assert automatic_dtype(hopper) == torch.bfloat16
    assert dtype_warning(turing, torch.float32, True) == (
        "cuda:0 (Tesla T4) does not compute in bfloat16: model.dtype is float32"
    )
    assert dtype_warning(turing, torch.bfloat16, False) == (
        "cuda:0 (Tesla T4) emulates bfloat16, slowly: model.dtype: float32 may be faster"
    )
    assert dtype_warning(turing, torch.float32, False) is None
    assert dtype_warning(hopper, torch.bfloat16, True) is None
    assert not has_bfloat16(torch.device("mps"))


def test_draws_from_a_seed_leave_the_other_draws_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with seeded(torch.device("cpu"), 5):
        inside = torch.rand(4)
    assert torch.equal(torch.rand(4), expected)
    with pytest.raises(KeyError), seeded(torch.device("cpu"), 5):
        raise KeyError
    torch.manual_seed(5)
    assert torch.equal(torch.rand(4), inside)


def test_a_gpus_generator_is_seeded_alone_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    states, current = {0: "a", 1: "b"}, [0]

    @contextlib.contextmanager
    def device(which: torch.device) -> Iterator[None]:
        before, current[0] = current[0], which.index
        yield
        current[0] = before

    fake = SimpleNamespace(
        get_rng_state=lambda device: states[device.index],
        set_rng_state=lambda state, device: states.update({device.index: state}),
        manual_seed=lambda seed: states.update({current[0]: f"seeded {seed}"}),
        device=device,
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: fake)
    with seeded(torch.device("cuda", 1), 7):
        assert states == {0: "a", 1: "seeded 7"}
        states[1] = "drawn from"
    assert states == {0: "a", 1: "b"}


def test_a_student_is_trained_where_the_base_is(gpus: SimpleNamespace, tmp_path: Any) -> None:
    """Alone, ``TrainingArguments`` takes cuda:0 and makes it the current device."""
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    stay_on(arguments, torch.device("cpu"))
    assert arguments.device == torch.device("cpu")
    stay_on(arguments, torch.device("cuda", 1))
    assert arguments.device == arguments.distributed_state.device == torch.device("cuda", 1)
    assert gpus.current == 1
    arguments.distributed_state._reset_state()
