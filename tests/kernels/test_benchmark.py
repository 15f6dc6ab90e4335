import importlib.util
import json

import torch

from kvopt.kernels import KLOptions, contenders
from kvopt.kernels.benchmark import run
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
        assert 0.3 < errors["kl"] / float(kl) < 3
        assert errors["gradient"] < 1e-2
        assert errors["value"] < 1e-2
    assert json.loads((tmp_path / "bench-kl.json").read_text())["shapes"][0]["results"]["kvopt"] == ours
    assert (tmp_path / "bench-kl.png").exists() == (importlib.util.find_spec("matplotlib") is not None)


def test_chunks_fit_the_budget_whatever_the_number_of_tokens():
    for dtype in (torch.float32, torch.bfloat16):
        p = problem(0.1, dtype, v=5000)
        plan = make_plan(p.candidate, p.reference, p.head, p.head, KLOptions(chunk_bytes=2**20))
        assert plan.rows_per_chunk * 5000 * 2 * plan.logits.itemsize <= 2**20
        assert plan.rows_per_chunk >= 20
