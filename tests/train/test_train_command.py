"""kvopt train: stages, what is trained again, wrong input, kills, several processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from kvopt.cli import app
from kvopt.config.document import load_config
from kvopt.errors import InputError, KvoptError
from kvopt.run.run import Run
from kvopt.train import trainer
from kvopt.train.commands import train_students
from kvopt.train.student import lora_student
from tests.jobs import artefacts, stages_in, write_job

STUDENTS: list[dict[str, Any]] = [
    {"name": "plain", "contexts": ["original"], "steps": 3},
    {
        "name": "mixed",
        "contexts": ["original", "none", "best-mutations:1", {"context": "kv-8", "weight": 2}, "soft-6"],
        "steps": 5,
        "loss": "anchored-kl",
    },
]


def write(
    folder: Path, students: list[dict[str, Any]], change: Callable[[dict[str, Any]], object] | None = None
) -> Path:
    def edit(config: dict[str, Any]) -> None:
        config["contexts"] = [c for c in config["contexts"] if c["name"] != "kv-best"]
        config["students"] = [{"batch_size": 4, "report_to": [], **student} for student in students]
        if change:
            change(config)

    return write_job(folder, edit)


def train(job: Path, out: Path, *sets: str, only: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    config, base_dir = load_config(job, sets)
    records = train_students(Run(config, base_dir, out, say=lambda line: None, bars=False), only)
    assert records is not None
    return [record.to_json() for record in records]


def trained_in(out: Path) -> list[str]:
    return [stage.partition("/")[2] for stage in stages_in(out) if stage.startswith("students/")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(write(folder, STUDENTS), folder / "out")
    return folder


@pytest.fixture
def again(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    shutil.copytree(finished, tmp_path / "job")
    (tmp_path / "job" / "out" / "ledger.jsonl").unlink()
    return tmp_path / "job"


def test_students_are_trained_in_order_and_say_what_they_are(finished: Path) -> None:
    assert trained_in(finished / "out") == ["plain", "mixed"]
    record = json.loads((finished / "out" / "students" / "mixed" / "kvopt-student.json").read_text())
    first = record["contexts"][0]
    assert (first["name"], first["kind"], first["weight"]) == ("original", "text", 1)
    assert [c["kind"] for c in record["contexts"]] == ["text", "text", "text", "kv", "soft"]
    assert record["steps"] == 5
    assert len(record["history"]) == 5
    entries = [json.loads(line) for line in (finished / "out" / "ledger.jsonl").read_text().splitlines()]
    entry = next(e for e in entries if e["stage"] == "students/mixed")
    assert (entry["steps"], entry["tokens_in"], entry["gold_tokens"]) == (5, record["tokens"], record["gold_tokens"])
    assert entry["seconds"] > 0
    assert not (finished / "out" / ".training" / "mixed").exists()


def test_nothing_is_trained_again_when_nothing_changed(again: Path) -> None:
    before = artefacts(again / "out")
    train(again / "job.yaml", again / "out", "students.mixed.accumulation=2", "students.plain.log_every=3")
    assert not (again / "out" / "ledger.jsonl").exists()
    assert {k: v for k, v in artefacts(again / "out").items() if k != "config.yaml"} == {
        k: v for k, v in before.items() if k != "config.yaml"
    }


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ("students.plain.learning_rate=0.1", ["plain"]),
        ("contexts.kv-8.steps=2", ["mixed"]),
        ("data.limit={train: 9, selection: 3}", ["plain", "mixed"]),
    ],
)
def test_a_change_trains_again_what_depends_on_it(again: Path, change: str, wanted: list[str]) -> None:
    train(again / "job.yaml", again / "out", change)
    assert trained_in(again / "out") == wanted


def test_a_damaged_student_is_trained_again_to_the_same_bytes(again: Path) -> None:
    before = artefacts(again / "out")
    path = again / "out" / "students" / "plain" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    train(again / "job.yaml", again / "out")
    assert trained_in(again / "out") == ["plain"]
    assert artefacts(again / "out") == before


def test_a_student_leaves_memory_before_the_next_one_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = write(tmp_path, [{"name": name, "contexts": ["original"], "steps": 2} for name in "ab"])
    trained: list[weakref.ref] = []
    alive: list[int] = []

    def watched(*args: Any, **settings: Any) -> Any:
        alive.append(sum(reference() is not None for reference in trained))
        made = lora_student(*args, **settings)
        trained.append(weakref.ref(made.model))
        return made

    monkeypatch.setattr(trainer, "lora_student", watched)
    train(job, tmp_path / "out", only=("a", "b"))
    assert alive == [0, 0]


def test_only_trains_the_named_and_an_unknown_name_is_an_error(tmp_path: Path) -> None:
    job = write(tmp_path, [STUDENTS[0], {**STUDENTS[0], "name": "other"}])
    assert [record["name"] for record in train(job, tmp_path / "out", only=("other",))] == ["other"]
    assert not (tmp_path / "out" / "students" / "plain").exists()
    with pytest.raises(InputError, match="no student 'x' in the config"):
        train(job, tmp_path / "out", only=("x",))


def test_run_trains_students_at_its_end_and_keeps_them(tmp_path: Path) -> None:
    job = write(tmp_path, [STUDENTS[0]])
    arguments = ["run", str(job), "--out", str(tmp_path / "out"), "--json"]
    first, second = (CliRunner().invoke(app, arguments) for _ in range(2))
    assert first.exit_code == second.exit_code == 0
    assert json.loads(first.stdout)["students"] == json.loads(second.stdout)["students"]
    assert trained_in(tmp_path / "out") == ["plain"]


WRONG = [
    ("contexts: [kv-99]", "students.s.contexts: no context 'kv-99'"),
    ("contexts: ['best-mutations:99']", "wants more mutations than mutations.count"),
    ("contexts: ['best-mutations:x']", "needs a number"),
    ("contexts: ['text:nothing.txt']", "nothing.txt"),
    ("contexts: []", "students.0.contexts"),
    ("contexts: [original, original]", "is given twice"),
    ("contexts: [{context: original, wieght: 2}]", "did you mean 'weight'?"),
    ("contexts: [{context: original, weight: 1.5}]", "expand takes whole numbers"),
    ("contexts: [original], loss: cee", "loss.kind: unknown value 'cee'"),
    ("contexts: [original], loss: {kind: asft, directoin: reverse}", "did you mean 'direction'?"),
    ("contexts: [original], schedule: {kind: state-adaptive, keep: 0}", "keep"),
    ("contexts: [original], steps: 3, epochs: 1", "give one of steps, epochs and tokens"),
    ("contexts: [original], tokens: 3, schedule: state-adaptive", "give steps or epochs"),
    ("contexts: [original], half: true", "half is an option of method: full"),
    ("contexts: [original], batch_size: 5, accumulation: 2", "no multiple of accumulation"),
    ("contexts: [original], lora: {targets: [nothing]}", "students.s.lora.targets"),
    ("contexts: [original], max_length: 20", "rows have more than 20 tokens"),
    ("contexts: [original], max_length: 20, too_long: drop", "rows have more than 20 tokens"),
    ("contexts: [original], dtype: float16", "float16 can be trained only on a GPU"),
    ("contexts: [original], report_to: [tensorbored]", "students.s.report_to"),
]


@pytest.mark.parametrize(("student", "reason"), WRONG, ids=[reason for _, reason in WRONG])
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path: Path, student: str, reason: str) -> None:
    job = write(tmp_path, [])
    text = job.read_text().replace("students: []", f"students: [{{name: s, {student}}}]")
    job.write_text(text)
    result: Result = CliRunner().invoke(app, ["train", str(job), "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, InputError), result.exception
    assert reason in str(result.exception)
    assert "\n" not in str(result.exception)


def test_a_config_without_students_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="students: the config has none"):
        train(write(tmp_path, []), tmp_path / "out")


def test_rows_that_are_too_long_are_dropped_under_every_context_and_counted(tmp_path: Path) -> None:
    from kvopt.train.pool import build_pool, names_of

    job = write(tmp_path, [{"name": "s", "contexts": ["original", "kv-8"], "steps": 1}])
    config, base_dir = load_config(job)
    run = Run(config, base_dir, tmp_path / "out", say=lambda line: None, bars=False)
    with run.opened():
        lengths = sorted(len(run.task().original.encoded.prefix) + len(row) for row in run.task().rows("train").rows)
        limit = lengths[len(lengths) // 2]
        student = config.students[0].model_copy(update={"max_length": limit, "too_long": "drop"})
        pool = build_pool(run.catalogue(names_of(student)), student, 0)
    fitting = [length for length in lengths if length <= limit]
    assert 0 < len(fitting) < len(lengths)
    assert (pool.rows, pool.dropped) == (len(fitting), len(lengths) - len(fitting))
    text, kv = pool.contexts
    assert [row.example_id for row in text.rows] == [row.example_id for row in kv.rows]
    gold = {row.example_id: row.gold for row in run.task().encoded.rows}
    assert all(row.gold == gold[row.example_id] for row in (*text.rows, *kv.rows))
    assert max(len(row) for row in text.rows) == limit


def test_mutations_taken_by_chance_are_those_of_the_seed(tmp_path: Path) -> None:
    from kvopt.train.pool import build_pool, names_of

    job = write(tmp_path, [{"name": "s", "contexts": ["random-mutations:1"], "steps": 1}])
    config, base_dir = load_config(job)
    run = Run(config, base_dir, tmp_path / "out", say=lambda line: None, bars=False)
    with run.opened():
        catalogue = run.catalogue(names_of(config.students[0]))
        names = [build_pool(catalogue, config.students[0], seed).contexts[0].name for seed in (*range(8), *range(8))]
    assert names[:8] == names[8:]
    assert len(set(names)) > 1


def test_tensorboard_events_are_written_by_default(tmp_path: Path) -> None:
    job = write(tmp_path, [{"name": "s", "contexts": ["original"], "steps": 2, "report_to": ["tensorboard"]}])
    train(job, tmp_path / "out")
    (events,) = (tmp_path / "out" / "logs" / "s").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_divergence_leaves_earlier_students_and_exits_1(tmp_path: Path) -> None:
    wild = {
        "name": "wild",
        "contexts": ["original"],
        "steps": 40,
        "method": "full",
        "learning_rate": 1e30,
        "clip": 1e30,
    }
    job = write(tmp_path, [STUDENTS[0], wild])
    result = CliRunner().invoke(app, ["train", str(job), "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, KvoptError)
    assert not isinstance(result.exception, InputError)
    assert "students.wild" in str(result.exception)
    assert (tmp_path / "out" / "students" / "plain" / "kvopt-student.json").is_file()
    assert not (tmp_path / "out" / "students" / "wild").exists()


def kvopt(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "kvopt.cli", *map(str, arguments)]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_a_run_killed_while_it_trains_ends_in_the_bytes_of_an_uninterrupted_one(tmp_path: Path) -> None:
    student = {"name": "s", "contexts": ["original", "soft-6"], "steps": 60, "checkpoint_every": 1}
    job = write(tmp_path, [{**student, "lora": {"dropout": 0.1}}])
    train(job, tmp_path / "whole")
    command = kvopt("train", job, "--out", tmp_path / "killed")
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed" / ".training").glob("s/checkpoint-*[1-9]/complete.json")):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "students").exists()
    train(job, tmp_path / "killed")
    assert artefacts(tmp_path / "killed") == artefacts(tmp_path / "whole")
    entry = json.loads((tmp_path / "killed" / "ledger.jsonl").read_text().splitlines()[-1])
    assert entry["resumed_from"] >= 1


@pytest.mark.slow
def test_two_processes_give_the_loss_curve_of_one(tmp_path: Path) -> None:
    mixed = {**STUDENTS[1], "steps": 8, "learning_rate": 0.01}
    job = write(tmp_path, [mixed, {"name": "full", "method": "full", "contexts": ["original", "kv-8"], "steps": 4}])
    (one, one_full) = train(job, tmp_path / "one")
    # A context learned by two processes has other last digits: the second run begins with the contexts of the first.
    shutil.copytree(tmp_path / "one", tmp_path / "two", ignore=shutil.ignore_patterns("students", ".training"))
    # accelerate starts processes on a CPU through MPI, which few machines have, and those for GPUs by itself; on a
    # machine without GPUs these use the CPU too.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [sys.executable, *launch, "-m", "kvopt", "train", str(job), "--out", str(tmp_path / "two"), "--json"]
    done = subprocess.run(
        command, env=ENVIRONMENT | {"ACCELERATE_USE_CPU": "1"}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (two, two_full) = json.loads(done.stdout)["students"]
    for ours, theirs in ((one, two), (one_full, two_full)):
        curve, other = ([point["loss"] for point in record["history"]] for record in (ours, theirs))
        assert other == pytest.approx(curve, abs=1e-5)
        assert (ours["tokens"], ours["gold_tokens"], ours["key"]) == (
            theirs["tokens"],
            theirs["gold_tokens"],
            theirs["key"],
        )
    assert json.loads((tmp_path / "two" / "ledger.jsonl").read_text().splitlines()[-1])["processes"] == 2
    assert torch.distributed.is_initialized() is False
