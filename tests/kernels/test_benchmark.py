import importlib.util
import json
import sys
import types

import pytest
import torch

from kvopt.kernels import KLOptions, contenders
from kvopt.kernels.benchmark import KLInputs, run
from kvopt.kernels.float64 import linear_kl64
from kvopt.kernels.plan import make_plan
from tests.kernels.cases import problem


def test_benchmark_measures_ours_skips_by_name_and_writes_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(contenders, "find_spec", lambda name: None)
    names = ["kvopt", "torch", "kvopt moments, stored", "TRL chunked divergence", "nonsense"]
    report = run([(70, 32, 1000)], names, tmp_path, repeats=2, show=True)
    entry = report["shapes"][0]
    assert set(entry["results"]) == set(names[:3])
    assert entry["skipped"]["TRL chunked divergence"] == "trl is not installed"
    assert "unknown" in entry["skipped"]["nonsense"]
    ours = entry["results"]["kvopt"]
    assert ours["median_ms"] > 0
    for kl, errors in ours["errors"].items():
        assert 0.3 < errors["kl"] / float(kl.removeprefix("KL ")) < 3
        assert errors["gradient"] < 1e-2
        assert errors["value"] < 1e-2
    assert json.loads((tmp_path / "bench-kl.json").read_text())["shapes"][0]["results"]["kvopt"] == ours
    table = (tmp_path / "bench-kl.md").read_text()
    assert "| **kvopt** |" in table
    assert "Skipped TRL chunked divergence: trl is not installed" in table
    assert (tmp_path / "bench-kl.png").exists() == (importlib.util.find_spec("matplotlib") is not None)


def test_given_hidden_states_are_measured_as_they_are():
    p = problem(0.1, torch.bfloat16, n=80, v=900)
    given = KLInputs(p.reference, {"near": p.candidate, "far": p.candidate * 2}, p.head.weight, "near", "mine")
    entry = run([given], ["kvopt", "torch"], repeats=1, show=False)["shapes"][0]
    assert entry["shape"] == (80, 96, 900)
    expected = linear_kl64(p.candidate[:64], p.reference[:64], p.head, p.head, KLOptions()).mean()
    assert entry["results"]["kvopt"]["errors"]["near"]["kl"] == pytest.approx(float(expected), rel=1e-6)
    assert entry["results"]["kvopt"]["errors"]["far"]["gradient"] < 1e-2


def test_flash_linear_attention_is_a_contender_where_it_is_installed(monkeypatch):
    """Its place is taken by a stand-in with the same signature: it needs a GPU, and is no dependency."""
    asked = []

    class FusedKLDivLoss:
        def __call__(self, x, target_x, weight, target_weight):
            asked.append((x.shape, weight is target_weight))
            return (x - target_x).square().sum()

    stand_in = types.ModuleType("fla.modules.fused_kl_div")
    stand_in.FusedKLDivLoss = FusedKLDivLoss
    for name in ("fla", "fla.modules"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.modules.fused_kl_div", stand_in)
    monkeypatch.setattr(contenders, "find_spec", lambda name: name == "fla")
    with pytest.raises(contenders.NotHere, match="GPU and flash-linear-attention"):
        contenders.build("fla fused KL", torch.device("cpu"))
    p = problem(0.1, torch.float32, n=3, v=50)
    loss = contenders.build("fla fused KL", torch.device("cuda"))(p.candidate, p.reference, p.head.weight)
    assert loss > 0
    assert asked == [((3, 96), True)]


def test_chunks_fit_the_budget_whatever_the_number_of_tokens():
    for dtype in (torch.float32, torch.bfloat16):
        p = problem(0.1, dtype, v=5000)
        plan = make_plan(p.candidate, p.reference, p.head, p.head, KLOptions(chunk_bytes=2**20))
        assert plan.rows_per_chunk * 5000 * 2 * plan.logits.itemsize <= 2**20
        assert plan.rows_per_chunk >= 20
