"""What a person at a terminal gets: help, completion, the next command, messages with the right words."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from kvopt.cli import PANELS
from kvopt.config.document import load_config
from kvopt.console.tables import has_width
from kvopt.errors import counted
from kvopt.export.inspection import size_of
from kvopt.run.inputs import read_inputs
from kvopt.storage.files import read_text
from tests.jobs import run_job, write_job, write_rows
from tests.tiny import tiny_folder

Kvopt = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A config with a student, and its run."""
    place = tmp_path_factory.mktemp("finished")
    student = {"name": "s", "contexts": ["original"], "steps": 4, "batch_size": 2, "report_to": []}
    config = write_job(place, lambda c: c.update(students=[student]))
    run_job(config, place / "out")
    return config, place / "out"


@pytest.fixture
def job(finished: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the run, to go on with."""
    return finished[0], shutil.copytree(finished[1], tmp_path / "out")


def last(text: str) -> str:
    return text.splitlines()[-1]


# help


@pytest.mark.parametrize("words", [[], ["bench"], ["bench", "kl"], *([name] for of in PANELS.values() for name in of)])
def test_h_is_help_everywhere(kvopt: Kvopt, words: list[str]) -> None:
    code, out, _ = kvopt(*words, "-h")
    assert code == 0
    assert out == kvopt(*words, "--help")[1]
    assert "Usage: kvopt" in out


@pytest.mark.parametrize("words", [[], ["bench"]])
def test_no_command_is_a_question_for_help(kvopt: Kvopt, words: list[str]) -> None:
    code, out, err = kvopt(*words)
    assert (code, err) == (0, "")
    assert "Usage: kvopt" in out


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_completion_can_be_installed_and_completes(tmp_path: Path) -> None:
    environment = os.environ | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "TERM": "dumb"}
    command = f"{shlex.quote(sys.executable)} -m kvopt"
    install = subprocess.run(
        ["bash", "-c", f"{command} --install-completion bash || {command} --install-completion; true"],
        env=environment, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "completion installed" in install.stdout, install.stderr
    assert ".bash_completions/kvopt.sh" in (tmp_path / ".bashrc").read_text()
    completed = subprocess.run(
        [sys.executable, "-m", "kvopt"], capture_output=True, text=True, timeout=120, check=True,
        env=environment | {"_KVOPT_COMPLETE": "complete_bash", "COMP_WORDS": "kvopt val", "COMP_CWORD": "1"},
    )  # fmt: skip
    assert completed.stdout.split() == ["validate"]


# the next command


def test_validate_ends_in_ok_and_the_next_command(kvopt: Kvopt, finished: tuple[Path, Path]) -> None:
    config = finished[0]
    code, out, err = kvopt("validate", config, "--set", "score.best=1")
    assert code == 0
    assert last(out) == "OK"
    assert last(err) == f"next: kvopt run {config} --set score.best=1"
    assert "rows: 11 to train on, 3 to choose by, 6 to report on" in out
    assert "template: chat messages with 1 slot (text)" in out
    assert "{'train'" not in out
    assert "next:" not in "".join(kvopt("validate", config, "--json")[1:])


def test_every_command_of_a_run_ends_in_the_next_one(kvopt: Kvopt, job: tuple[Path, Path]) -> None:
    config, out = job
    err = kvopt("run", config, "--out", out)[2]
    assert last(err) == f"next: kvopt evaluate {config} --out {out}"
    err = kvopt("evaluate", config, "--out", out, "--set", "evaluate.rows=2", "--student", "base")[2]
    assert last(err) == f"next: kvopt train {config} --set evaluate.rows=2 --out {out}"
    _, text, err = kvopt("train", config, "--out", out)
    assert last(err) == f"next: kvopt evaluate {config} --out {out}"
    assert ", held-out NLL " in last(text)
    err = kvopt("mutate", config, "--out", out)[2]
    assert last(err) == f"next: kvopt run {config} --out {out}"


def test_the_recommended_context_is_what_to_take_along(kvopt: Kvopt, job: tuple[Path, Path]) -> None:
    config, out = job
    words = ("--out", out, "--set", "students=[]")
    _, table, err = kvopt("run", config, *words)
    (marked,) = [line for line in table.splitlines() if " * " in line and "recommended" not in line]
    name = marked.split()[0]
    to = "text" if name.startswith("m0") else "peft"
    assert last(err) == f"next: kvopt export '{out}#{name}' --to {to}"
    assert kvopt(*shlex.split(last(err).removeprefix("next: kvopt ")), "--out", out.parent / "e")[0] == 0
    err = kvopt("optimize", config, "--out", out, "--only", "soft-6")[2]
    assert last(err) == f"next: kvopt export '{out}#soft-6' --to peft"
    err = kvopt("score", config, "--out", out, "--context", "original", "--context", "m002")[2]
    assert last(err) == f"next: kvopt export '{out}#m002' --to text"
    err = kvopt("score", config, "--out", out)[2]
    assert last(err) == f"next: kvopt run {config} --out {out}"
    assert "next:" not in kvopt("run", config, *words, "--json")[2]


# words


def test_counts_have_the_form_that_goes_with_them() -> None:
    assert counted(1, "row") == "1 row"
    assert counted(0, "row") == "0 rows"
    assert counted(2, "study") == "2 studies"
    assert counted(2, "way") == "2 ways"
    assert counted(3, "gold output") == "3 gold outputs"


def test_sizes_have_the_unit_that_goes_with_them() -> None:
    assert [size_of(n) for n in (0, 1023, 1024, 12_800, 3 * 2**20)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "12.5 KiB",
        "3.0 MiB",
    ]


def test_inspect_shows_the_size_of_a_small_context(kvopt: Kvopt, finished: tuple[Path, Path]) -> None:
    out = kvopt("inspect", finished[1] / "contexts" / "soft-6")[1]
    assert "0.0 MiB" not in out
    assert "(768 B, PEFT PROMPT_TUNING)" in out


def test_rounding_is_no_interval() -> None:
    assert not has_width((0.5, 0.5))
    assert not has_width((0.0, 1e-12))
    assert has_width((0.0, 1e-6))


def test_a_missing_file_names_the_folder_that_was_searched(kvopt: Kvopt, tmp_path: Path) -> None:
    config = write_job(tmp_path / "job")
    assert last(kvopt("validate", "nope.yaml")[2]) == (
        f"error: nope.yaml: no such file in {tmp_path} (kvopt init writes a starter config)"
    )
    line = last(kvopt("validate", config, "--set", "data.train=rows.jsonl")[2])
    assert line.startswith(f"error: rows.jsonl: no such file in {tmp_path / 'job'} (paths are relative")
    line = last(kvopt("validate", config, "--set", "data.train=sub/rows.jsonl")[2])
    assert f"no such file: there is no {tmp_path / 'job' / 'sub'}" in line
    line = last(kvopt("validate", config, "--set", "data.train=/rows.jsonl")[2])
    assert line.startswith("error: /rows.jsonl: no such file (")
    line = last(kvopt("validate", config, "--set", "model.base=./nope")[2])
    assert f"no such folder: {tmp_path / 'nope'}" in line


def test_a_device_that_is_not_there_is_refused_before_a_run(
    kvopt: Kvopt, finished: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    code, _, err = kvopt("validate", finished[0], "--set", "model.device=cuda")
    assert code == 2
    assert last(err) == f"error: model.device cuda: torch {torch.__version__} sees no cuda device (use auto or cpu)"


# init


def prompts(folder: Path, system: str, chat: bool) -> Path:
    words = ("rain tomorrow", "a quiet song", "that old book", "snow", "two loud albums", "the wind here", "novels")
    rows = []
    for number, word in enumerate(words):
        prompt: object = f"{system}{word}\nLabel:"
        if chat:
            prompt = [{"role": "system", "content": system}, {"role": "user", "content": f"Message: {word}"}]
        rows.append({"prompt": prompt, "output": ("weather", "music")[number % 2]})
    write_rows(folder / "2024.jsonl", rows)
    return folder / "2024.jsonl"


LONG = "Sort the message into one of the labels.\n\n" + "Rules:\n- one label\n- {\"no\": 'prose'}  \n" * 8 + "Message: "


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("system", [LONG, "Sort it: ", "# hard: [x]\n\n  &a *b |\n", ""])
def test_an_inferred_config_is_commented_and_learns_a_context(
    kvopt: Kvopt, tmp_path: Path, system: str, chat: bool
) -> None:
    if chat and not system:
        system = "Be brief."
    code, _, err = kvopt("init", "got", "--infer", prompts(tmp_path, system, chat))
    assert code == 0, err
    path = tmp_path / "got" / "kvopt.yaml"
    text = read_text(path)
    assert text.count("#") > 30
    config, folder = load_config(path, ())
    assert config.name == "2024"
    assert len(config.contexts) == 1
    template = read_inputs(config, folder).template
    for row in (folder / "train.jsonl").read_text("utf-8").splitlines()[:1]:
        filled = template.fill(yaml.safe_load(row))
        expected = f"{system}rain tomorrow\nLabel:"
        assert (filled[0]["content"] if chat else filled) == (system if chat else expected)  # type: ignore[index]
    base = ("--set", f"model.base={tiny_folder('llama')}")
    code, out, err = kvopt("validate", path, *base)
    assert code == 0, err
    assert last(out) == "OK"
