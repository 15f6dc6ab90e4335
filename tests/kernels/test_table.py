"""The table that picks a backend: what is stored, what a benchmark writes, what a plan makes of it."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch

from kvopt.kernels import Head, KernelInputError, KLOptions, UnsupportedError, linear_kl, plan, table
from kvopt.kernels.benchmark import run
from kvopt.kernels.plan import make_plan
from tests.kernels.cases import problem

ENVIRONMENT = {"device": "test", "torch": "2", "python": "3", "threads": 1}


def report(times: dict[tuple[int, int, int], dict[str, float]], gradient: float = 1e-3) -> dict[str, Any]:
    """As a benchmark returns it, with these milliseconds by shape and use."""
    shapes = [
        {
            "shape": shape,
            "results": {
                f"kvopt: {use}": {"median_ms": ms, "errors": {"near": {"gradient": gradient}}}
                for use, ms in uses.items()
            },
        }
        for shape, uses in times.items()
    ]
    return {"environment": ENVIRONMENT, "dtype": "bfloat16", "shapes": shapes}


@pytest.fixture
def path(tmp_path):
    shutil.copy(table.PATH, tmp_path / "backends.json")
    return tmp_path / "backends.json"


def test_the_stored_table_serves_every_device_and_says_what_is_measured():
    stored = json.loads(table.PATH.read_text())
    for kind in ("cpu", "cuda", "rocm"):
        for features in (16, 576, 1024, 1025, 8192):
            assert table.best_use(kind, features, 262144, stored) in table.USES
    assert stored["cpu"]["measured"]["shapes"]
    assert stored["cuda"]["measured"] is None
    assert table.best_use("cuda", 1024, 9, stored) == "triton store-free"
    assert table.best_use("cuda", 1025, 9, stored) == "triton rows"


def test_a_benchmark_writes_thresholds_half_way_between_what_it_measured(path):
    fast, slow = "triton store-free", "triton rows"
    times = {
        (8, 100, 1000): {fast: 1.0, slow: 2.0},
        (8, 400, 1000): {fast: 2.0, slow: 1.0},
        (8, 400, 4000): {fast: 1.0, slow: 2.0},
    }
    table.write_table(report(times), "Test GPU", path)
    stored = json.loads(path.read_text())
    assert stored["Test GPU"]["measured"]["device"] == "test"
    expected = {(200, 1): fast, (201, 2000): slow, (201, 2001): fast, (9999, 9999): fast, (9999, 1): slow}
    for (features, vocabulary), use in expected.items():
        assert table.best_use("Test GPU", features, vocabulary, stored) == use
    assert stored["cuda"] == json.loads(table.PATH.read_text())["cuda"]


def test_one_winner_is_one_choice_and_what_breaks_the_contract_never_wins(path):
    both = {(8, 100, 1000): {"torch": 2.0, "torch compiled rows": 1.0}, (8, 400, 1000): {"torch compiled rows": 1.0}}
    assert table.write_table(report(both), "cpu", path) == [{"use": "torch compiled rows"}]
    with pytest.raises(KernelInputError, match="stays as it is"):
        table.write_table(report(both, gradient=0.2), "cpu", path)


def test_a_plainer_backend_is_kept_where_another_is_hardly_faster(path):
    close, clear = {"torch compiled rows": 95.0, "torch": 100.0}, {"torch compiled rows": 80.0, "torch": 100.0}
    assert table.write_table(report({(8, 100, 1000): close}), "cpu", path) == [{"use": "torch"}]
    assert table.write_table(report({(8, 100, 1000): clear}), "cpu", path) == [{"use": "torch compiled rows"}]


def test_a_real_benchmark_of_the_backends_fills_the_table(path):
    result = run([(24, 16, 700)], ["kvopt: torch", "kvopt: triton rows"], repeats=1, show=False)
    assert table.write_table(result, "cpu", path) == [{"use": "torch"}]
    measured = json.loads(path.read_text())["cpu"]["measured"]
    assert measured["shapes"][0]["shape"] == [24, 16, 700]
    assert measured["shapes"][0]["milliseconds"]["torch"] > 0


def planned(monkeypatch, choices: list[dict[str, Any]], **options: Any) -> plan.Plan:
    """A plan of 16-bit inputs on a GPU with these choices, as far as that can be had without one."""
    monkeypatch.setattr(plan, "device_kind", lambda device: "cuda")
    monkeypatch.setattr(plan, "_triton_problem", lambda *args: None)
    monkeypatch.setattr(plan, "cpu_has_bfloat16_products", lambda: True)
    monkeypatch.setattr(plan, "best_use", lambda *args: table.best_use(*args, {"cuda": {"choices": choices}}))
    p = problem(0.1, torch.bfloat16, n=4, v=900, softcap=options.pop("softcap", None))
    return make_plan(p.candidate, p.reference, p.head, p.head, KLOptions(**options))


def test_plans_follow_the_table_unless_they_are_told_otherwise(monkeypatch):
    store_free = [{"max_features": 96, "use": "triton store-free"}, {"use": "triton rows"}]
    rows = [{"max_features": 95, "use": "triton store-free"}, {"use": "triton rows"}]
    cases = [
        (store_free, {}, ("triton", True)),
        (rows, {}, ("triton", False)),
        (store_free, {"backend": "triton-rows"}, ("triton", False)),
        (rows, {"backend": "triton-store-free"}, ("triton", True)),
        (store_free, {"backend": "torch"}, ("torch", False)),
        (store_free, {"divergence": "reverse"}, ("triton", False)),
        (store_free, {"softcap": 20.0}, ("triton", False)),
        ([{"use": "torch"}], {}, ("torch", False)),
        ([{"use": "torch"}], {"backend": "triton"}, ("triton", False)),
    ]
    for choices, options, expected in cases:
        made = planned(monkeypatch, choices, **options)
        assert (made.backend, made.store_free) == expected, options
    assert planned(monkeypatch, [{"use": "torch compiled rows"}]).options.rows == "compiled"
    assert planned(monkeypatch, [{"use": "torch compiled rows"}], rows="eager").options.rows == "eager"
    with pytest.raises(UnsupportedError, match="triton-rows"):
        planned(monkeypatch, rows, backend="triton-store-free", divergence="jsd")


def test_a_gpu_backend_on_a_cpu_is_refused_by_name(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    p = problem(0.1, torch.float32, n=2)
    with pytest.raises(UnsupportedError, match=r"triton-rows.*CUDA or ROCm"):
        linear_kl(p.candidate, p.reference, Head(p.head.weight), options=KLOptions(backend="triton-rows"))
