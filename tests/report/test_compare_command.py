"""The command: what it prints and writes, for one run and several, and that it needs no torch."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvopt.cli import app
from kvopt.cli.report import renew_page
from kvopt.errors import InputError
from kvopt.report import report_of
from kvopt.report.tables import terminal_table
from tests.jobs import write_job
from tests.report.made import add_metrics, change, write_run

FILES = {"report.html", "report.json", "report.csv", "report.md"}


def kvopt(*arguments: object) -> tuple[str, str]:
    """Standard output and error; errors are raised."""
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False, standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.stdout, done.stderr


def reports(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith("report.")}


def test_one_run_gets_its_report_beside_it(run: Path):
    out, err = kvopt("compare", run)
    assert reports(run) == FILES
    assert "kv-16 keeps the template's behaviour" in " ".join(out.split())
    assert "12.0 s" not in out
    assert "12 s" in out
    assert f"wrote {run / 'report.html'}" in err


def test_formats_and_folder_are_chosen(run: Path, tmp_path: Path):
    kvopt("compare", run, "--format", "csv, html", "--out", tmp_path / "there")
    assert reports(tmp_path / "there") == {"report.html", "report.csv"}
    assert reports(run) == set()
    with pytest.raises(InputError, match="unknown format 'pdf'"):
        kvopt("compare", run, "--format", "pdf")
    with pytest.raises(InputError, match="no format is named"):
        kvopt("compare", run, "--format", ",")


def test_a_name_that_ends_in_html_is_the_page_itself(run: Path, tmp_path: Path):
    _, err = kvopt("compare", run, "--out", tmp_path / "cmp.html")
    assert (tmp_path / "cmp.html").read_text("utf-8").startswith("<!DOCTYPE html>")
    assert err.splitlines() == [f"wrote {tmp_path / 'cmp.html'}"]
    kvopt("compare", run, "--out", tmp_path / "cmp.HTML", "--format", "html")
    assert (tmp_path / "cmp.HTML").is_file()
    kvopt("compare", run, "--out", tmp_path / "folder.v2")
    assert reports(tmp_path / "folder.v2") == FILES
    with pytest.raises(InputError, match="cannot hold other formats"):
        kvopt("compare", run, "--out", tmp_path / "cmp.html", "--format", "json")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_narrow_terminal_gets_whole_columns_and_says_what_is_left_out(run: Path, width: int):
    report, _ = report_of([run])
    out = Console(width=width, file=io.StringIO())
    with out.capture() as got:
        out.print(terminal_table(report, width))
    text = got.get()
    head = next(line for line in text.splitlines() if "context" in line and "tokens" in line)
    assert "…" not in text
    left_out = " ".join(text.split()).partition("too narrow for ")[2]
    for name in ("context", "tokens", "forward KL", "build", "p95", "gold NLL", "top-1", "95 % interval"):
        assert (name in head) != (name in left_out), name
    assert "build" in head or width < 80
    assert all(len(line.rstrip()) <= width for line in text.splitlines())


def test_json_is_the_report_and_writes_nothing_unasked(run: Path, tmp_path: Path):
    out, _ = kvopt("compare", run, "--json")
    assert reports(run) == set()
    kvopt("compare", run, "--json", "--out", tmp_path / "there", "--format", "json")
    assert json.loads(out) == json.loads((tmp_path / "there" / "report.json").read_text("utf-8"))


def test_several_runs_are_one_table_one_page_and_what_changed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    other = write_run(tmp_path / "other")
    change(other / "leaderboard.json", name="[red]second[/red]")
    monkeypatch.chdir(tmp_path)
    out, _ = kvopt("compare", run, other)
    assert reports(tmp_path / "comparison") == FILES
    assert "[red]second[/red]" in out
    assert "KLs can be compared" in " ".join(out.split())
    lines = (tmp_path / "comparison" / "report.csv").read_text("utf-8").splitlines()
    assert len(lines) == 1 + 2 * 7
    rows = [line for line in out.splitlines() if "kv-16" in line and "keeps" not in line]
    assert len(rows) == 1, "one row for a context that is in both"
    assert "the same" in rows[0]


def test_markdown_has_the_advice_and_a_row_for_each_context(run: Path):
    kvopt("compare", run)
    lines = (run / "report.md").read_text("utf-8").splitlines()
    assert lines[2].startswith("kv-16 keeps the template's behaviour to 0.0200 nats")
    assert sum(line.startswith("| ") for line in lines) == 2 + 7
    assert "| m002 | text | 42 | 0.0045 ~ |" in "\n".join(lines)


def test_what_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="no such run directory"):
        kvopt("compare", tmp_path / "nowhere")


def test_comparing_imports_neither_torch_nor_transformers(run: Path):
    code = (
        "import sys; from kvopt.cli import main; sys.argv = ['kvopt', 'compare', sys.argv[1]]\n"
        "try: main()\nexcept SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules), 'a model library was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_run_leaves_its_page_and_says_where(tmp_path: Path):
    config = write_job(tmp_path / "job")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "kvopt.cli", "run", str(config), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"report: {tmp_path / 'out' / 'report.html'}" in done.stderr
    html = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "kv-best" in html
    assert "would rather say" in html


def test_the_page_is_renewed_for_finished_runs_alone(run: Path, tmp_path: Path):
    renew_page(run)
    assert reports(run) == {"report.html"}
    renew_page(tmp_path)
    assert reports(tmp_path) == set()


def test_what_is_kept_and_the_metrics_are_in_every_table(run: Path):
    add_metrics(run)
    out, _ = kvopt("compare", run)
    board = json.loads((run / "leaderboard.json").read_text("utf-8"))["contexts"]
    bare = next(row["kl_forward"]["mean"] for row in board if row["name"] == "none")
    mine = next(row for row in board if row["name"] == "mine")
    kept = f"{100 * (1 - mine['kl_forward']['mean'] / bare):.1f}"
    [line] = [line.split() for line in out.splitlines() if line.lstrip().startswith("mine ")]
    assert {kept, "0.400", "0.500"} <= set(line)
    [line] = [line for line in (run / "report.md").read_text("utf-8").splitlines() if line.startswith("| mine ")]
    assert f"| {kept} | 0.400 | 0.500 |" in line
    rows = list(csv.DictReader((run / "report.csv").read_text("utf-8").splitlines()))
    means = {row["name"]: (row["json-valid"], row["rouge-l"]) for row in rows}
    assert (means["mine"], means["none"]) == (("0.4", "0.5"), ("0.0", ""))
