"""Triton is taken by ``auto`` where its kernels work, once looked at; the torch backend stands in for it here."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvopt.base.hub import cache_folder
from kvopt.kernels import KLOptions, linear_kl, plan, table, torch_backend, trust
from kvopt.kernels.user_files import user_file
from tests.kernels.cases import problem


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache and a memory of their own, and a table that asks for Triton on the CPU."""
    monkeypatch.setenv("KVOPT_CACHE", str(tmp_path))
    monkeypatch.setattr(trust, "_known", {})
    monkeypatch.setattr(plan, "_triton_problem", lambda *args: None)
    monkeypatch.setattr(plan, "best_use", lambda *args: "triton rows")
    return tmp_path / "kernels" / "triton.json"


class Triton:
    """A backend that works, or fails with ``error``, or is off by ``factor``; it counts its calls."""

    def __init__(self, error: Exception | None = None, factor: float = 1.0) -> None:
        self.error, self.factor, self.calls = error, factor, 0

    def value_and_hidden_gradient(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.calls += 1
        if self.error:
            raise self.error
        value, gradient = torch_backend.value_and_hidden_gradient(*args)
        return value, None if gradient is None else gradient * self.factor


def use(monkeypatch: pytest.MonkeyPatch, backend: Triton) -> Triton:
    monkeypatch.setattr(trust, "_triton_backend", lambda: backend)
    module = sys.modules["kvopt.kernels.linear_kl"]  # the package has a function of that name
    monkeypatch.setattr(module, "_backend", lambda made: backend if made.backend == "triton" else torch_backend)
    return backend


def run(**options: Any) -> str:
    """The backend that was used."""
    p = problem(0.1, torch.float32, n=3)
    return linear_kl(p.candidate, p.reference, p.head, options=KLOptions(**options)).backend


def test_a_kernel_that_works_is_looked_at_once_for_all_processes(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    triton = use(monkeypatch, Triton())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [run(), run()] == ["triton", "triton"]
    assert triton.calls == 3
    assert list(json.loads(cache.read_text()).values()) == [None]
    trust._known.clear()  # another process
    assert run() == "triton"
    assert triton.calls == 4
    assert run(divergence="reverse") == "triton"
    assert triton.calls == 6
    assert len(json.loads(cache.read_text())) == 2


@pytest.mark.parametrize(
    ("triton", "reason"),
    [
        (
            Triton(RuntimeError("out of resource: shared memory, Required: 98304\nHardware limit: 65536")),
            "limit: 65536",
        ),
        (Triton(factor=1.02), r"its numbers are off by 2.0e-02"),
        (Triton(factor=float("nan")), r"its numbers are off by inf"),
    ],
)
def test_one_that_does_not_work_is_not_taken_and_said_once(
    monkeypatch: pytest.MonkeyPatch, cache: Path, triton: Triton, reason: str
) -> None:
    use(monkeypatch, triton)
    triton.calls = 0
    with pytest.warns(UserWarning, match=f"rows kernel of Triton is not used on cpu: .*{reason}; torch is") as told:
        assert [run(), run()] == ["torch", "torch"]
    assert len(told) == triton.calls == 1
    [stored] = json.loads(cache.read_text()).values()
    assert "\n" not in stored
    trust._known.clear()
    with pytest.warns(UserWarning, match="is not used"):
        assert run() == "torch"
    assert triton.calls == 1, "the next process knows it"
    assert trust._known


def test_what_is_asked_for_by_name_is_not_questioned(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Triton(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        run(backend="triton-rows")
    assert run(backend="torch") == "torch"


def test_a_lack_of_memory_says_nothing_of_the_kernel(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    use(monkeypatch, Triton(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.warns(UserWarning, match="no memory to try it"):
        assert run() == "torch"
    assert not cache.exists()


def test_another_version_is_looked_at_again(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    triton = use(monkeypatch, Triton())
    run()
    monkeypatch.setattr(trust, "_machine", lambda device: ("cpu", "torch 99"))
    run()
    assert triton.calls == 4
    assert len(json.loads(cache.read_text())) == 2


def test_a_cache_that_cannot_be_written_or_read_is_done_without(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    use(monkeypatch, Triton())
    cache.parent.parent.joinpath("kernels").write_text("a file")
    with pytest.warns(UserWarning, match="cannot be read and is not used"):
        assert run() == "triton"


def test_the_table_of_the_user_is_taken_first_and_the_packages_own_stays(cache: Path) -> None:
    packaged = table.PATH.read_bytes()
    result = {"median_ms": 1.0, "errors": {"k": {"gradient": 0}}}
    shapes = [{"shape": (8, 100, 1000), "results": {"kvopt: triton rows": result}}]
    report = {"environment": {"device": "GPU"}, "dtype": "bfloat16", "shapes": shapes}
    table.load_table.cache_clear()
    try:
        assert "GPU" not in table.load_table()
        table.write_table(report, "GPU")
        assert table.load_table()["GPU"]["choices"] == [{"use": "triton rows"}]
        assert table.load_table()["cpu"] == json.loads(packaged)["cpu"]
        assert table.PATH.read_bytes() == packaged
        assert list(json.loads(user_file("backends.json").read_text())) == ["GPU"]
        user_file("backends.json").write_text('{"cpu": {"choices": [{"use": "of tomorrow"}]}}')
        table.load_table.cache_clear()
        with pytest.warns(UserWarning, match="its entry 'cpu' is not used; measure it again"):
            assert table.load_table() == json.loads(packaged)
    finally:
        table.load_table.cache_clear()


@pytest.mark.parametrize("variables", [{"KVOPT_CACHE": "/a"}, {"XDG_CACHE_HOME": "/b"}, {}])
def test_the_kernels_find_the_cache_of_everything_else(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name in ("KVOPT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert user_file("x.json") == cache_folder() / "kernels" / "x.json"


def test_a_launch_has_the_tensors_gpu_as_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_backend = pytest.importorskip("kvopt.kernels.triton_backend", reason="the triton package is optional")
    entered = []

    class Guard:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            entered.append(self.device)

        def __exit__(self, *error: object) -> None:
            entered.append(None)

    monkeypatch.setattr(torch.cuda, "device", Guard)
    guarded = triton_backend._on_its_device(lambda made, candidate: len(entered))
    assert guarded(None, SimpleNamespace(device=torch.device("cuda", 1))) == 1
    assert entered == [torch.device("cuda", 1), None]
    assert guarded(None, torch.zeros(1)) == 2
