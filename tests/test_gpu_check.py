"""``tools/gpu_check.sh`` in its small form on the CPU: what it writes, that no part stops another, resumption."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.gpu.device import require

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tools" / "gpu_check.sh"
PARTS = ("tests", "kernels", "attention", "steps")
QUICK = "-k equal_hidden_states_give_exactly_zero"


def check(out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script with this Python."""
    given = {**os.environ, "PYTHON": sys.executable, "OUT": str(out), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([str(SCRIPT), *arguments], env=given, capture_output=True, text=True, timeout=300)


def facts(out: Path, part: str) -> dict[str, Any]:
    return json.loads((out / f"{part}.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def report() -> ModuleType:
    """tools/gpu_report.py."""
    spec = importlib.util.spec_from_file_location("gpu_report", ROOT / "tools" / "gpu_report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_failing_part_does_not_stop_the_others_and_is_the_only_one_to_run_again(tmp_path: Path) -> None:
    first = check(tmp_path, "--device", "cpu", GPU_CHECK_PYTEST="--no-such-option")
    assert first.returncode == 1, first.stdout
    assert not facts(tmp_path, "tests")["complete"]
    assert all(facts(tmp_path, part)["complete"] for part in PARTS[1:]), first.stdout
    _kernels_are_measured(tmp_path)
    _steps_are_measured(tmp_path)
    _packed_rows_are_measured(tmp_path)

    again = check(tmp_path, "--device", "cpu", GPU_CHECK_PYTEST=QUICK)
    assert again.returncode == 0, again.stdout
    assert "kernels: complete already" in again.stdout
    assert "steps: complete already" in again.stdout
    results = {item["name"]: item["result"] for item in facts(tmp_path, "tests")["items"]}
    assert results["test_kernels.py::test_equal_hidden_states_give_exactly_zero[torch]"] == "passed"
    last = again.stdout.rstrip().splitlines()[-5:]
    assert [line.split()[:2] for line in last[:4]] == [[part, "complete"] for part in PARTS]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*(f"{part}.{kind}" for part in PARTS for kind in ("json", "md")), "gpu_check.log"]
    )


def _kernels_are_measured(out: Path) -> None:
    kernels = facts(out, "kernels")
    ours = [item for item in kernels["items"] if item["name"] == "kvopt"]
    assert [item["shape"] for item in ours] == ["150, 40, 1501", "90, 70, 2201"]
    for item in ours:
        assert item["ms"] > 0
        assert item["measured"]["of_3f"] == pytest.approx(1.5 * item["measured"]["of_2f"])
        assert max(error["gradient"] for error in item["measured"]["errors"].values()) < 1e-2
    assert sum(item["name"] == "one head product (F)" for item in kernels["items"]) == 2
    table = (out / "kernels.md").read_text("utf-8")
    assert "cross-entropy" in table
    assert "| 150, 40, 1501 | kvopt: triton rows |" in table
    assert "needs a GPU" in table


def _steps_are_measured(out: Path) -> None:
    items = facts(out, "steps")["items"]
    for model in ("Qwen3-4B geometry", "Llama-3-8B geometry"):
        mine = {item["name"]: item for item in items if item["model"] == model}
        step, peft = mine["kvopt, padded rows"], mine["PEFT CARTRIDGE, full logits"]
        packed = mine["kvopt, packed rows"]
        assert packed["kl"] == pytest.approx(step["kl"], rel=1e-4)
        scores, full = mine["kvopt: one prefix, bodies"], mine["plain transformers: full prompts"]
        assert step["kl"] == pytest.approx(peft["kl"], rel=1e-2)
        assert scores["kl"] == pytest.approx(full["kl"], rel=1e-2)
        assert min(item["seconds"] for item in (step, peft, scores, full)) > 0
        assert "x the time" in peft["note"]


def _packed_rows_are_measured(out: Path) -> None:
    items = facts(out, "attention")["items"]
    assert [item["name"] for item in items] == ["padded", "packed"] * 2, "in float32 and bfloat16"
    for item in items[1::2]:
        assert "masks of numbers; outputs" in item["note"]
        assert "x the time" in item["note"]


def test_a_part_out_of_time_is_noted_and_a_wheel_that_does_not_fit_is_named(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "broken-1.0-py3-none-any.whl").write_bytes(b"no wheel")
    done = check(tmp_path / "out", "--device", "cpu", "steps", GPU_CHECK_SECONDS="1", WHEELS=str(tmp_path / "wheels"))
    assert done.returncode == 1
    assert "wheels: broken-1.0-py3-none-any.whl is left out" in done.stdout
    assert facts(tmp_path / "out", "steps")["ended"] == "stopped after 1 s"
    assert "not complete" in done.stdout.splitlines()[-2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_gpu_that_was_asked_for_and_is_missing_fails(tmp_path: Path) -> None:
    done = check(tmp_path, "--device", "cuda", "tests")
    assert done.returncode == 1
    assert [item["why"] for item in facts(tmp_path, "tests")["items"]] == ["torch sees no CUDA device"]
    assert not facts(tmp_path, "tests")["complete"]
    require(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="sees no CUDA device"):
        require(torch.device("cuda"))


def test_the_script_says_how_it_is_used() -> None:
    helped = subprocess.run([str(SCRIPT), "--help"], capture_output=True, text=True)
    assert helped.returncode == 0
    for word in ("pydantic-core", "pip download", "SMOLLM2", "--again", "tests|kernels|attention|steps"):
        assert word in helped.stdout
    wrong = subprocess.run([str(SCRIPT), "everything"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "unknown argument everything" in wrong.stderr


def test_a_killed_part_keeps_what_it_had(report: ModuleType, tmp_path: Path) -> None:
    part = report.Part(tmp_path, "steps", "small", "cpu", {"what": "name", "s": "seconds"}, "Steps")
    part.add({"name": "one | two", "seconds": 1.25})
    report.note_killed(tmp_path, "steps", "small", "cpu", "stopped after 3 s")
    stored = facts(tmp_path, "steps")
    assert stored["items"] == [{"name": "one | two", "seconds": 1.25}]
    assert (stored["complete"], stored["failed"]) == (False, 1)
    table = (tmp_path / "steps.md").read_text("utf-8")
    assert "not complete (stopped after 3 s)" in table
    assert r"| one \| two | 1.25 |" in table
    assert report.summary(tmp_path, ["steps"])[1] == 1
    assert report.summary(tmp_path, ["kernels"])[1] == 1  # no result at all


def test_only_a_whole_result_of_the_same_sources_sizes_and_device_is_taken_again(
    report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = report.Part(tmp_path, "tests", "small", "cpu")
    part.add({"name": "a", "result": "passed"})
    assert not report.is_done(tmp_path, "tests", "small", "cpu")
    assert part.finish() == 0
    assert report.is_done(tmp_path, "tests", "small", "cpu")
    assert not report.is_done(tmp_path, "tests", "full", "cpu")
    assert not report.is_done(tmp_path, "tests", "small", "cuda")
    monkeypatch.setattr(report, "sources_sha256", lambda: "others")
    assert not report.is_done(tmp_path, "tests", "small", "cpu")
