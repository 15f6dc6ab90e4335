"""Several processes of one launch: the same results as one process alone, files written by the first, no hang.

Each launch is two processes on a CPU that exchange tensors through gloo.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from kvopt.base.launch import LAUNCH, Launch, split
from kvopt.base.loading import Base
from kvopt.base.wire import packed, unpacked
from kvopt.config.document import load_config
from kvopt.run.run import Run
from tests.jobs import NOT_COMPARED, write_job
from tests.tiny import save_tiny

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "kvopt"]
LEARNED = ("kv-8", "soft-6")


def change(folder: Path, config: dict[str, Any], **more: Any) -> None:
    kv, _, soft = config["contexts"]
    config["model"]["base"] = str(folder / "base")
    config["contexts"] = [kv | {"steps": 20, "eval_every": 10}, soft | {"steps": 20, "eval_every": 10}]
    config["evaluate"] = {"metrics": ["exact-match"], "max_new_tokens": 3, "batch_size": 3, "frozen": None}
    config["mutations"]["count"] = 1
    config.update(more)


def write(folder: Path, **more: Any) -> Path:
    """A job on a base that other processes can load."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tiny(folder / "base", "llama", "chatml")
    return write_job(folder, partial(change, folder, **more))


def launched(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [*TORCHRUN, *map(str, arguments)]
    return subprocess.run(
        command, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=300, check=False
    )


def alone(job: Path, out: Path) -> Run:
    run = Run(*load_config(job), out, say=lambda line: None)
    with run.opened():
        run.run()
    return run


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in NOT_COMPARED)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def errors(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith(("error:", "interrupted"))]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def one(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one") / "out"
    alone(job, out)
    return out


@pytest.fixture(scope="module")
def two(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two") / "out"
    done = launched("run", job, "--out", out, "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["contexts"]  # one document, by one process
    return out


def test_reference_mutations_and_scores_of_texts_are_those_of_one_process_to_the_byte(one: Path, two: Path) -> None:
    ours, theirs = contents(one), contents(two)
    assert ours.keys() == theirs.keys()
    same = [name for name in ours if name.startswith(("reference/", "mutations")) or "m001" in name or "none" in name]
    assert len(same) >= 6
    assert [name for name in same if ours[name] != theirs[name]] == []


def test_learned_contexts_are_those_of_one_process_to_rounding(one: Path, two: Path) -> None:
    for name in LEARNED:
        path = Path("contexts") / name / "adapter_model.safetensors"
        ours, theirs = (load_file(folder / path)["prompt_embeddings"] for folder in (one, two))
        assert (ours - theirs).abs().max() < 1e-5
        record, other = (json.loads((folder / path.parent / "kvopt.json").read_text()) for folder in (one, two))
        assert record["key"] == other["key"]
    boards = [json.loads((folder / "leaderboard.json").read_text())["contexts"] for folder in (one, two)]
    for ours, theirs in zip(*boards, strict=True):
        assert ours["kl_forward"]["mean"] == pytest.approx(theirs["kl_forward"]["mean"], rel=1e-6, abs=1e-9)


@pytest.mark.slow
def test_the_same_number_of_processes_gives_the_same_bytes(job: Path, two: Path, tmp_path: Path) -> None:
    again = launched("run", job, "--out", tmp_path / "out")
    assert again.returncode == 0, again.stderr[-3000:]
    assert contents(tmp_path / "out") == contents(two)


def test_another_number_of_processes_goes_on_with_what_is_there(job: Path, two: Path, tmp_path: Path) -> None:
    shutil.copytree(two, tmp_path / "out")
    run = alone(job, tmp_path / "out")
    assert run.directory.stages_worked == 0
    assert contents(tmp_path / "out") == contents(two)


@pytest.mark.slow
def test_training_and_evaluating_a_student_is_divided(tmp_path: Path) -> None:
    student = {"name": "s", "contexts": ["original", "kv-8"], "steps": 6, "batch_size": 4, "report_to": []}
    job = write(tmp_path / "job", students=[student])
    for command in (("run", job), ("evaluate", job)):
        done = launched(*command, "--out", tmp_path / "two")
        assert done.returncode == 0, done.stderr[-3000:]
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    shutil.rmtree(tmp_path / "one" / "students" / "s" / "evaluation")
    done = subprocess.run(
        [sys.executable, "-m", "kvopt", "evaluate", job, "--out", tmp_path / "one"],
        env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = contents(tmp_path / "one"), contents(tmp_path / "two")
    measured = [name for name in ours if "evaluation" in name]
    assert len(measured) > 4
    assert [name for name in measured if ours[name] != theirs[name]] == []


@pytest.mark.parametrize(
    ("rank", "shard"),
    [(1, "null"), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(0, "null"), (1, "fsdp2")])],
)
def test_a_process_that_is_killed_ends_all_with_one_line(tmp_path: Path, rank: int, shard: str) -> None:
    job = write(tmp_path / "job")
    out, err = tmp_path / "out", tmp_path / "stderr"
    command = [*TORCHRUN, "optimize", str(job), "--out", str(out), "--set", "contexts.0.steps=100000", "--only", "kv-8"]
    command += ["--set", f"model.shard={shard}"]
    with err.open("w") as stderr:
        process = subprocess.Popen(command, env=ENVIRONMENT, stderr=stderr, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(out.glob(".state/*.safetensors")):
        assert process.poll() is None, err.read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ours = [p for p in psutil.Process(process.pid).children() if p.environ().get("RANK") == str(rank)]
    ours[0].send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == 1
    (line,) = errors(err.read_text())
    assert line.startswith("error: ")
    assert line.endswith("; finished work is kept: run the same command again to go on")
    assert list(out.glob(".state/*.safetensors"))


def test_a_batch_that_leaves_a_process_without_a_row_is_one_line(
    kvopt: Any, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LAUNCH, "count", 3)
    monkeypatch.setattr(LAUNCH, "start", lambda device, shares: None)
    monkeypatch.setattr(LAUNCH, "may_speak", lambda: True)
    monkeypatch.setattr(LAUNCH, "end", lambda code: None)
    code, _, err = kvopt("optimize", job, "--out", "out", "--set", "contexts.1.batch_size=2")
    assert code == 2
    assert err.splitlines()[-1] == (
        "error: contexts.soft-6.batch_size: a batch of 2 rows leaves some of 3 processes without one"
        " (launch at most 2, or raise it)"
    )


def test_a_command_for_one_process_is_refused_in_several(kvopt: Any, job: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = kvopt("validate", job)
    assert code == 2
    assert err.splitlines()[-1].startswith("error: kvopt validate runs in one process (")
    monkeypatch.setenv("RANK", "1")
    assert kvopt("validate", job) == (2, "", "")  # the first process speaks for all


# ---- without other processes


def doubled(base: Base, item: list[int], factor: int) -> list[int]:
    return [factor * value for value in item]


def test_work_of_one_process_is_done_in_order_and_reported(llama: Base) -> None:
    seen: list[int] = []
    assert split(llama, doubled, [[1], [2, 3]], 2, progress=seen.append) == [[2], [4, 6]]
    assert seen == [1, 2]
    assert not Launch().divides(llama)


def test_an_order_holds_a_views_values_alone_and_names_what_every_process_has(llama: Base) -> None:
    large = torch.arange(1_000_000, dtype=torch.float32)
    sent = (
        large[10:20].view(2, 5),
        torch.empty(3, 0),
        torch.tensor([True]),
        torch.ones(2).bfloat16(),
        llama,
        llama.head,
    )
    data = packed(sent, {"base": llama})
    assert len(data) < 10_000
    view, none, flag, half, base, head = unpacked(data, {"base": llama}.__getitem__, torch.device("cpu"))
    assert torch.equal(view, large[10:20].view(2, 5))
    assert none.shape == (3, 0)
    assert flag.tolist() == [True]
    assert (half.dtype, half.tolist()) == (torch.bfloat16, [1.0, 1.0])
    assert base is llama
    assert head is llama.head
