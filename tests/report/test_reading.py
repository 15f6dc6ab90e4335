"""Run directories that are not there, not finished or damaged: one line says what and where. Parts that a run need not
have may be missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from kvopt.errors import InputError
from kvopt.measure.score import Interval, Score
from kvopt.report import report_of, write_report
from kvopt.report.reading import read_run, read_runs
from kvopt.run.leaderboard import Entry, ranked_rows
from tests.report.made import change, leaderboard, write_run


def test_no_folder_no_run_and_an_unfinished_run_are_told_apart(tmp_path: Path):
    with pytest.raises(InputError, match="no such run directory"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"has no leaderboard.json \(give a run directory"):
        read_run(tmp_path)
    (tmp_path / "manifest.json").write_text("{}", "utf-8")
    with pytest.raises(InputError, match="has not come to its end"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("leaderboard.json", "[]", "is not a leaderboard"),
        ("leaderboard.json", "{", "leaderboard.json: cannot be read"),
        ("leaderboard.json", '{"contexts": [], "noise_floor": 3}', "is not a leaderboard"),
        ("manifest.json", "[1]", "is damaged: not a JSON object"),
        ("config.yaml", "a: [", "config.yaml: cannot be read"),
        ("samples.json", '{"examples": 1}', "samples.json: is damaged"),
        ("ledger.jsonl", '{"stage": 1}\n', "ledger.jsonl:1: the line is damaged"),
        ("mutations.jsonl", "x\n{}\n", "mutations.jsonl:1: the line is damaged"),
        ("contexts/kv-16/kvopt.json", "{}", "kvopt.json: is not the record of a context"),
        ("students/s/evaluation.json", "[]", "evaluation.json: is not an evaluation"),
        ("study.json", "[]", "study.json: is not a study"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(run: Path, name: str, text: str, line: str):
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).write_text(text, "utf-8")
    with pytest.raises(InputError) as caught:
        report_of([run])
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_number_that_is_none_is_found_in_the_leaderboard(run: Path):
    document = leaderboard()
    document["contexts"][1]["kl_forward"]["mean"] = "near"
    change(run / "leaderboard.json", **document)
    with pytest.raises(InputError, match=r"contexts\.1\.kl_forward\.mean"):
        read_run(run)


def test_half_a_line_at_the_end_of_the_ledger_is_left_out(run: Path):
    with (run / "ledger.jsonl").open("a") as file:
        file.write('{"stage": "half')
    assert len(read_run(run).ledger) == 9


@pytest.mark.parametrize(
    "missing", ["samples.json", "mutations.jsonl", "ledger.jsonl", "contexts", "manifest.json", "config.yaml", "all"]
)
def test_a_report_is_made_of_what_is_there(run: Path, tmp_path: Path, missing: str):
    for path in list(run.iterdir()):
        if path.name != "leaderboard.json" and missing in (path.name, "all"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    _, written = write_report([run], tmp_path / "out")
    assert "kv-16" in written[0].read_text("utf-8")


def test_a_run_without_learned_contexts_or_mutations_has_a_page(run: Path, tmp_path: Path):
    board = leaderboard()
    board["contexts"] = [r for r in board["contexts"] if r["name"] in ("original", "none")]
    change(run / "leaderboard.json", **board | {"other_mutations": []})
    for name in ("mutations.jsonl", "samples.json"):
        (run / name).unlink()
    shutil.rmtree(run / "contexts")
    _, written = write_report([run], tmp_path / "out")
    assert "This run has no contexts to choose from" in written[0].read_text("utf-8")


def test_a_run_with_one_validation_row_has_a_report_without_intervals(run: Path, tmp_path: Path):
    document = leaderboard()
    document["rows"]["validation"] = 1
    for one in [*document["contexts"], *document["other_mutations"]]:
        for scores in (one, one.get("selection")):
            if scores and "kl_forward" in scores:
                scores["kl_forward"]["ci95"] = scores["gold_nll_ci95"] = None
        one.pop("separable_from_best", None)
    change(run / "leaderboard.json", **document)
    report, written = write_report([run], tmp_path / "out")
    texts = {path.suffix: path.read_text("utf-8") for path in written}
    assert report["runs"][0]["contexts"][1]["kl_forward"]["ci95"] is None
    assert "A single validation row gives no intervals" in report["runs"][0]["advice"]["sentences"][-1]
    assert "not separable</strong>" not in texts[".html"]
    assert "| kv-full | kv | 40 | 0.0040 | 99.5 | – |" in texts[".md"]
    assert "1 validation row, noise floor" in texts[".md"]
    assert write_report([run, write_run(tmp_path / "other")], tmp_path / "two")[1]


def test_without_intervals_nothing_is_called_inseparable():
    one, two = (Entry(name, "kv", 4, score, None) for name, score in (("a", alone(0.1)), ("b", alone(0.2))))
    rows = [row.to_json() for row in ranked_rows([two, one])]
    assert [(row["name"], row.get("separable_from_best")) for row in rows] == [("a", None), ("b", None)]


def alone(kl: float) -> Score:
    """The numbers of a single row."""
    return Score(Interval(kl, None), kl, Interval(1.0, None), 1.0, 1, 4)


def test_a_template_from_a_file_is_known_from_the_leaderboard_and_missing_in_old_runs(run: Path):
    (run / "config.yaml").write_text("template: {file: prompt.txt}\n", "utf-8")
    assert read_run(run).template is not None
    document = leaderboard()
    del document["template"]
    (run / "leaderboard.json").write_text(json.dumps(document), "utf-8")
    assert read_run(run).template is None


def test_runs_are_labelled_by_name_and_by_folder_where_names_are_the_same(run: Path, tmp_path: Path):
    other = write_run(tmp_path / "other")
    assert [r.label for r in read_runs([run, other])] == ["run", "other"]
    change(other / "leaderboard.json", name="second")
    assert [r.label for r in read_runs([run, other])] == ["made", "second"]
    with pytest.raises(InputError, match="is given twice"):
        read_runs([run, run / ".." / "run"])


def test_samples_that_do_not_fit_together_are_refused(run: Path):
    document = json.loads((run / "samples.json").read_text("utf-8"))
    document["examples"][1]["contexts"]["kv-16"]["kl"].pop()
    change(run / "samples.json", **document)
    with pytest.raises(InputError, match=r"samples.json: is damaged.*validation:1 has values for more or fewer tokens"):
        read_run(run)
    del document["examples"][1]["contexts"]["kv-16"]
    change(run / "samples.json", **document)
    with pytest.raises(InputError, match="validation:1 lacks kv-16"):
        read_run(run)


def test_odd_manifests_and_configs_are_taken_for_empty(run: Path, tmp_path: Path):
    change(run / "manifest.json", base="text", versions=[1])
    (run / "config.yaml").write_text("students: 3\ntemplate: text\n", "utf-8")
    report, _ = write_report([run], tmp_path / "out")
    assert report["runs"][0]["manifest"]["base"] == "text"


def test_a_board_that_leaves_out_its_intervals_has_a_page(run: Path, tmp_path: Path):
    document = leaderboard()
    document |= {"headlines": ["exact-match"], "answered": 4}
    for one in document["contexts"]:
        one["metrics"] = {"exact-match": {"mean": 0.5}}
    change(run / "leaderboard.json", **document)
    _, [page] = write_report([run], tmp_path / "page.html")
    assert "kv-16" in page.read_text("utf-8")
