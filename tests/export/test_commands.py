"""kvopt export, move, compose, truncate and inspect on the command line: what they say, write and refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvopt.contexts import load_context
from kvopt.export import upload
from tests.jobs import run_job, write_job
from tests.tiny import tiny_base

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config (job.yaml) and its finished run (run)."""
    folder = tmp_path_factory.mktemp("job")
    run_job(write_job(folder), folder / "run")
    return folder


@pytest.fixture
def document(kvopt: Command) -> Callable[..., dict[str, Any]]:
    """Run a command with --json that must succeed; returns what it printed."""

    def run(*arguments: Any) -> dict[str, Any]:
        code, out, err = kvopt(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return run


@pytest.fixture
def fails(kvopt: Command) -> Callable[..., str]:
    """Run a command that must fail with one line; returns the line."""

    def run(*arguments: Any) -> str:
        code, out, err = kvopt(*arguments)
        assert code == 2, err
        assert out == ""
        assert "Traceback" not in err
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        return line

    return run


def test_export_says_where_and_inspect_how(kvopt: Command, job: Path, tmp_path: Path) -> None:
    code, out, _ = kvopt("export", f"{job / 'run'}#kv-8", "--to", "peft")
    assert code == 0
    assert "exports/kv-8-peft: README.md says how to use it" in out
    assert "PeftModel.from_pretrained" in kvopt("inspect", "exports/kv-8-peft")[1]
    assert kvopt("inspect", f"{job / 'run'}#kv-8")[1] == kvopt("inspect", job / "run/contexts/kv-8")[1]


def test_export_pushes_when_told_and_checks_the_name_first(
    document: Any, fails: Any, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[str, str, bool]] = []
    monkeypatch.setattr(
        upload, "push", lambda folder, to, private: sent.append((str(folder), to, private)) or "address"
    )
    result = document("export", job / "run/contexts/kv-8", "--to", "hf-cache", "--push-to-hub", "me/context")
    assert result["pushed_to"] == "address"
    assert sent == [("exports/kv-8-hf-cache", "me/context", True)]
    assert "give USER/NAME" in fails("export", job / "run/contexts/kv-8", "--to", "peft", "--push-to-hub", "context")
    assert not (tmp_path / "exports/kv-8-peft").exists()


def test_options_of_another_format_are_not_swallowed(fails: Any, job: Path, tmp_path: Path) -> None:
    kv = job / "run/contexts/kv-8"
    for to, *options in (
        ("hf-cache", "--peft-type", "CARTRIDGE"),
        ("peft", "--block-size", "8"),
        ("peft", "--partial-block"),
        ("peft", "--config", job / "job.yaml"),
    ):
        assert f"{options[0]}: is of --to" in fails("export", kv, "--to", to, *options)
    assert "add --push-to-hub" in fails("export", kv, "--to", "peft", "--public")
    assert not (tmp_path / "exports").exists()


def test_inspect_says_what_a_text_context_is_and_what_a_run_has(fails: Any, job: Path) -> None:
    run = job / "run"
    assert f"kvopt export {run}#m001 --to text writes it" in fails("inspect", f"{run}#m001")
    assert "there are original, kv-8" in fails("inspect", f"{run}#kv-9")


def test_move_there_and_back_changes_nothing(document: Any, job: Path, tmp_path: Path) -> None:
    source = job / "run/contexts/kv-8"
    there = document("move", source, "--offset", 50)
    assert there["positions"] == {"first": 50, "body": 58}
    back = document("move", tmp_path / there["folder"], "--offset", 0, "--out", "back")
    base = tiny_base("llama")
    states = [load_context(Path(p), base).states for p in (source, there["folder"], back["folder"])]  # type: ignore[union-attr]
    torch.testing.assert_close(states[1], states[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states[2], states[0], rtol=1e-5, atol=1e-5)


def test_a_moved_context_says_that_peft_does_not_look_there(kvopt: Command, job: Path) -> None:
    kvopt("move", job / "run/contexts/kv-8", "--offset", "50", "--out", "moved")
    code, out, _ = kvopt("inspect", "moved")
    assert code == 0
    assert "positions 50 and up" in out
    assert "PeftModel" not in out


def test_a_moved_context_scores_as_before(document: Any, job: Path) -> None:
    document("move", job / "run/contexts/kv-8", "--offset", 50, "--out", "moved")
    board = document("score", job / "job.yaml", "--context", job / "run/contexts/kv-8", "--context", "moved")
    kl = [row["kl_forward"]["mean"] for row in board["contexts"]]
    assert kl[0] == pytest.approx(kl[1], rel=1e-3)


def test_compose_measures_both_and_the_pair(document: Any, job: Path) -> None:
    run = job / "run"
    result = document("compose", f"{run}#kv-8", f"{run}#soft-6", "--config", job / "job.yaml", "--name", "pair",
                      "--run", run)  # fmt: skip
    assert (result["tokens"], result["kind"]) == (14, "kv")
    assert [row["name"] for row in result["measured"]] == ["kv-8", "soft-6", "pair"]
    record = json.loads(Path("pair/kvopt.json").read_text())
    assert [part["name"] for part in record["origin"]["of"]] == ["kv-8", "soft-6"]
    assert record["scores"]["validation"]["kl_forward"] == result["measured"][-1]["kl_forward"]
    score = document("score", job / "job.yaml", "--context", "pair")["contexts"][0]
    assert score["kl_forward"]["mean"] == pytest.approx(result["measured"][-1]["kl_forward"]["mean"], rel=1e-6)


def test_truncate_chooses_on_selection_and_reports_on_validation(document: Any, job: Path) -> None:
    result = document("truncate", job / "run/contexts/kv-best", "--tokens", 10, "--config", job / "job.yaml")
    tried = [row for row in result["measured"] if row["split"] == "selection"]
    assert len(tried) == 4
    best = min(tried, key=lambda row: row["kl_forward"]["mean"])
    assert best["name"].endswith(result["by"])
    whole, short = [row for row in result["measured"] if row["split"] == "validation"]
    assert (whole["name"], short["name"], short["tokens"]) == ("kv-best", "kv-best-10", 10)
    assert whole["kl_forward"]["mean"] < short["kl_forward"]["mean"], "the KL that it costs"
    facts = document("inspect", result["folder"])
    assert facts["origin"]["operation"] == "truncate"
    assert facts["metrics"]["kl_forward"]["mean"] == short["kl_forward"]["mean"]


def test_truncate_without_a_task_keeps_the_first_or_the_last(kvopt: Command, fails: Any, job: Path) -> None:
    source = job / "run/contexts/kv-8"
    code, out, err = kvopt("truncate", source, "--tokens", "4", "--by", "last")
    assert code == 0, err
    assert "not measured" in out
    assert load_context(Path("kv-8-4"), tiny_base("llama")).tokens == 4
    assert "give the config" in fails("truncate", source, "--tokens", "4")
    assert "give the config" in fails("truncate", source, "--tokens", "4", "--by", "attention", "--out", "x")
    assert "one of auto, refitted" in fails("truncate", source, "--tokens", "4", "--by", "best")


def test_only_what_these_commands_made_is_replaced(kvopt: Command, fails: Any, job: Path, tmp_path: Path) -> None:
    learned = job / "run/contexts/kv-best"
    before = {path.name: path.read_bytes() for path in learned.iterdir()}
    for command in (("move", "--offset", 3), ("truncate", "--tokens", 4, "--by", "first"), ("compose", learned)):
        verb, *options = command
        line = fails(verb, job / "run/contexts/kv-8", *options, "--out", learned)
        assert "the context itself" in line or "was not made by move, compose or truncate" in line
    assert {path.name: path.read_bytes() for path in learned.iterdir()} == before
    for offset in (3, 5):
        assert kvopt("move", job / "run/contexts/kv-8", "--offset", offset, "--out", "moved")[0] == 0
    assert json.loads(Path("moved/kvopt.json").read_text())["positions"]["first"] == 5
    assert "is no name" in fails("compose", learned, job / "run/contexts/kv-8", "--name", "../elsewhere")


def test_what_cannot_be_done_is_one_line(fails: Any, job: Path, tmp_path: Path) -> None:
    run = job / "run"
    assert "cannot be moved" in fails("move", f"{run}#soft-6", "--offset", "3")
    assert "cannot be shortened" in fails("truncate", f"{run}#soft-6", "--tokens", "3", "--by", "first")
    assert "text context cannot be changed" in fails("move", f"{run}#m001", "--offset", "3")
    assert "window of 512" in fails("move", f"{run}#kv-8", "--offset", "510")
    assert "give 1 to 7" in fails("truncate", f"{run}#kv-8", "--tokens", "8", "--by", "first")
    assert "is the context itself" in fails("move", f"{run}#kv-8", "--offset", "3", "--out", run / "contexts/kv-8")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    assert "is there already" in fails("move", f"{run}#kv-8", "--offset", "3", "--out", "mine")
    assert (tmp_path / "mine/notes.txt").read_text() == "mine"


def test_a_student_is_described_and_not_taken_for_a_context(kvopt: Command, fails: Any, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    folder.mkdir()
    facts = {
        "format_version": 1, "kvopt_version": "0.1.0", "name": "s1", "method": "lora", "base": {"name": "some-base"},
        "contexts": [{"name": "original"}, {"name": "m001"}], "steps": 6, "epochs": 2.1818,
        "history": [{"step": 6, "loss": 0.25}],
    }  # fmt: skip
    (folder / "kvopt-student.json").write_text(json.dumps(facts))
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    out = kvopt("inspect", folder)[1]
    assert "s1: a student trained by lora (6 steps, 2.18 epochs)" in out
    assert "base: some-base" in out
    assert "trained on 2 contexts: original, m001" in out
    assert "loss 0.25" in out
    assert "PeftModel.from_pretrained" in out
    assert "is a student, not a context" in fails("export", folder, "--to", "peft")
