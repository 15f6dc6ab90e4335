"""The gate for CI: exit code 1 and one line where a context is too far or a metric too low, 2 for what is not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.report.made import add_metrics, change, write_run


@pytest.fixture
def measured(run: Path) -> Path:
    """The run with metrics: kv-16 is recommended, with a KL of 0.02 and a json-valid of 0.8."""
    add_metrics(run)
    return run


def gate(*arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``kvopt compare``, as a shell sees them."""
    command = [sys.executable, "-m", "kvopt.cli", "compare", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_a_kl_above_the_limit_is_one_line_and_exit_code_1(measured: Path):
    code, out, err = gate(measured, "--fail-above", 0.0199)
    assert (code, out) == (1, "")
    assert err == "failed: kv-16: forward KL 0.02 (limit: at most 0.0199)\n"
    assert not list(measured.glob("report.*")), "no file was asked for"


def test_a_kl_at_the_limit_passes(measured: Path):
    code, out, err = gate(measured, "--fail-above", 0.02)
    assert (code, out) == (0, "")
    assert err == "passed: kv-16: forward KL 0.02 (limit: at most 0.02)\n"


def test_a_metric_below_the_limit_fails_and_both_limits_are_one_line(measured: Path):
    assert gate(measured, "--metric", "json-valid", "--fail-below", 0.8)[0] == 0
    code, _, err = gate(measured, "--metric", "json-valid", "--fail-below", 0.95)
    assert (code, err) == (1, "failed: kv-16: json-valid 0.8 (limit: at least 0.95)\n")
    code, _, err = gate(measured, "--fail-above", 0.001, "--metric", "json-valid", "--fail-below", 0.95)
    assert code == 1
    assert err.count("\n") == 1
    assert "forward KL 0.02" in err
    assert "json-valid 0.8" in err


def test_a_context_can_be_named(measured: Path):
    code, _, err = gate(measured, "--fail-above", 0.02, "--context", "mine")
    assert (code, err) == (1, "failed: mine: forward KL 0.06 (limit: at most 0.02)\n")
    assert gate(measured, "--fail-above", 0.02, "--context", "kv-full")[0] == 0


def test_each_of_several_runs_is_checked(measured: Path, tmp_path: Path):
    other = write_run(tmp_path / "other")
    document = json.loads((other / "leaderboard.json").read_text("utf-8"))
    for one in document["contexts"]:
        if one["name"] == "kv-16":
            one["kl_forward"]["mean"] = 0.03
    change(other / "leaderboard.json", **document)
    code, _, err = gate(measured, other, "--fail-above", 0.025)
    assert (code, err) == (1, "failed: other: kv-16: forward KL 0.03 (limit: at most 0.025)\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--fail-above", "0.1", "--context", "kv-17"), "no context 'kv-17' (it has original, kv-full, m002,"),
        (("--metric", "f1", "--fail-below", "1"), "no metric 'f1' for kv-16 (it has json-valid, rouge-l)"),
        (("--metric", "rouge-l", "--fail-below", "1", "--context", "none"), "rouge-l is not defined for none"),
        (("--metric", "f1"), "--metric: needs --fail-below"),
        (("--fail-below", "1"), "--fail-below: needs --metric"),
        (("--context", "kv-16"), "--context: needs a limit"),
        (("--fail-above", "nan"), "nan is not a limit"),
    ],
)
def test_what_is_not_there_is_exit_code_2_and_one_line(measured: Path, arguments: tuple[str, ...], words: str):
    code, out, err = gate(measured, *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1


def test_a_run_without_metrics_and_a_run_that_still_goes_are_refused(run: Path):
    code, _, err = gate(run, "--metric", "json-valid", "--fail-below", 0.5)
    assert code == 2
    assert "it has none: set evaluate.metrics in the config" in err
    change(run / "leaderboard.json", complete=False)
    code, _, err = gate(run, "--fail-above", 1)
    assert code == 2
    assert "the run still goes" in err
    assert gate(run, "--fail-above", 1, "--context", "kv-16")[0] == 0


def test_files_and_json_are_written_where_they_are_asked_for(measured: Path, tmp_path: Path):
    code, out, err = gate(measured, "--fail-above", 0.001, "--json", "--out", tmp_path / "page.html")
    assert code == 1
    assert json.loads(out)["runs"][0]["recommended"] == "kv-16"
    assert err.count("\n") == 1
    assert (tmp_path / "page.html").is_file()
