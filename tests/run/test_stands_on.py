"""A page shows nothing that stands on another base, other data or another template than its board; keys hold what they
must."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvopt.documents.part import BaseIdentity, StandsOn
from kvopt.report import report_of, write_report
from kvopt.report.reading import read_run
from kvopt.run.run import Run
from kvopt.train.commands import evaluate_all, train_students
from tests.jobs import entries, stages_in, write_job
from tests.report.made import change, write_run
from tests.tiny import save_tiny
from tests.train.evaluated import open_evaluated, student

BASIS = StandsOn(
    base=BaseIdentity(name="a", weights="w", config="c", tokenizer="t", chat_template=None),
    template_sha256="C",
    data_sha256="D",
    tokens_sha256="T",
)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"base": {"name": "moved", "weights": "w"}}, None),
        ({"base": {"weights": "other"}}, "another base"),
        ({"base": {"chat_template": "now there is one"}}, "another base"),
        ({"template_sha256": "other"}, "another template"),
        ({"data_sha256": "other"}, "other data"),
        ({"tokens_sha256": "other"}, "another rendering of the template"),
        ({"template_sha256": None, "base": None}, None),
    ],
)
def test_what_differs_is_named(changes: dict[str, Any], why: str | None) -> None:
    other = StandsOn.model_validate(BASIS.to_json() | changes)
    assert BASIS.differs_from(other) == other.differs_from(BASIS) == why


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A config and its run with a board, samples, answers, a student and evaluations."""
    folder = tmp_path_factory.mktemp("stands")
    save_tiny(folder / "base", "llama", "chatml")
    settings = {"rows": 2, "max_new_tokens": 2, "resamples": 100, "metrics": ["exact-match"]}
    config = write_job(
        folder,
        lambda c: c.update(
            model={"base": str(folder / "base"), "dtype": "float32", "device": "cpu"},
            contexts=c["contexts"][:1], students=[student("s1", "original")], evaluate=settings,
        ),
    )  # fmt: skip
    with opened(config, folder / "out").opened() as run:
        run.run()
    train_students(opened(config, folder / "out"))
    evaluate(config, folder / "out")
    return config, folder / "out"


def opened(config: Path, out: Path, *sets: str) -> Run:
    return open_evaluated(config, out, sets)


def evaluate(config: Path, out: Path, *sets: str) -> None:
    with opened(config, out, *sets).opened() as run:
        evaluate_all(run, ["base"])


def left_out(out: Path) -> list[str]:
    return [f"{one.what}: {one.why}" for one in read_run(out).left_out]


def test_every_result_says_what_it_stands_on(measured: Any) -> None:
    _, out = measured
    manifest = json.loads((out / "manifest.json").read_text())
    names = ("leaderboard.json", "samples.json", "answers.json", "students/base/evaluation.json")
    for name in names:
        stands_on = json.loads((out / name).read_text())["stands_on"]
        assert stands_on == {key: manifest[key] for key in stands_on}
        assert len(stands_on) == 4
    assert left_out(out) == []
    assert report_of([out])[0]["runs"][0]["left_out"] == []


def test_an_evaluation_of_another_base_is_not_shown_beside_the_board(measured: Any, tmp_path: Path) -> None:
    config, out = measured
    out = Path(shutil.copytree(out, tmp_path / "out"))
    save_tiny(tmp_path / "other", "llama", "chatml", initializer_range=0.3)
    evaluate(config, out, f"model.base={tmp_path / 'other'}")
    names = ("manifest.json and config.yaml", "contexts/kv-8", "the evaluation of base")
    assert left_out(out) == [f"{name}: another base" for name in names]
    report, _ = write_report([out], out)
    assert report["runs"][0]["evaluations"] == []
    assert report["runs"][0]["manifest"] == {}
    page = (out / "report.html").read_text()
    assert "the evaluation of base: another base (kvopt evaluate measures it on what the board stands on)" in page
    with opened(config, out, f"model.base={tmp_path / 'other'}").opened() as run:
        run.run()
    assert [line for line in left_out(out) if "base" in line] == []


def test_weights_that_changed_in_their_place_are_another_base(measured: Any, tmp_path: Path) -> None:
    """The name alone is the same: a wording that is scored now must not land on yesterday's board."""
    config, out = measured
    out, base = Path(shutil.copytree(out, tmp_path / "out")), config.parent / "base"
    shutil.copytree(base, tmp_path / "before")
    try:
        save_tiny(base, "llama", "chatml", initializer_range=0.3)
        wording = tmp_path / "mine.txt"
        wording.write_text("Sort it.")
        with opened(config, out).opened() as run:
            board = run.put_on_board(run.stored_contexts(f"text:{wording}"))
        assert board is not None
        assert {row.name for row in board.contexts} == {"original", "none", "mine"}
        assert "samples.json: another base" in left_out(out)
        assert "the evaluation of base: another base" in left_out(out)
    finally:
        shutil.rmtree(base)
        shutil.copytree(tmp_path / "before", base)


Change = Callable[[Path], None]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("contexts/kv-8/kvopt.json", "contexts/kv-8: other data"),
        ("samples.json", "samples.json: other data"),
        ("answers.json", "answers.json: other data"),
        ("students/base/evaluation.json", "the evaluation of base: other data"),
    ],
)
def test_each_file_of_other_data_is_left_out_and_named(measured: Any, tmp_path: Path, name: str, what: str) -> None:
    out = Path(shutil.copytree(measured[1], tmp_path / "out"))
    found = entries(out / name)
    (found if "kvopt.json" in name else found["stands_on"])["data_sha256"] = "other"
    (out / name).write_text(json.dumps(found))
    assert left_out(out) == [what]
    run = read_run(out)
    shown = {"samples": run.samples, "answers": run.answers, "evaluations": run.evaluations, "contexts": run.learned}
    assert not shown[name.partition("/")[0].removesuffix(".json").replace("students", "evaluations")]


def test_mutations_of_another_search_are_not_shown_under_the_names_of_the_boards(measured: Any, tmp_path: Path) -> None:
    config, out = measured
    out = Path(shutil.copytree(out, tmp_path / "out"))
    with opened(config, out, "seed=5").opened() as run:
        run.mutations()
    assert "mutations.jsonl: another search than that of the board's mutations" in left_out(out)
    assert read_run(out).mutations == []


def test_a_study_of_another_template_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", students=True)
    board = json.loads((run / "leaderboard.json").read_text())
    change(run / "leaderboard.json", **board | {"stands_on": {"template_sha256": "C"}})
    assert read_run(run).study is not None
    study = json.loads((run / "study.json").read_text())
    change(run / "study.json", **study | {"stands_on": {"template_sha256": "B"}})
    assert read_run(run).study is None
    assert "study.json: another template" in left_out(run)


@pytest.mark.parametrize(
    ("version", "stages"),
    [
        ("kvopt.measure.reference.REFERENCE_VERSION", {"reference", "scores/", "contexts/kv-8", "samples"}),
        ("kvopt.run.scoring.SCORES_VERSION", {"scores/"}),
        ("kvopt.run.stages.DESCENT_VERSION", {"contexts/kv-8"}),
        ("kvopt.run.stages.RULES_VERSION", {"mutations"}),
        ("kvopt.run.answers.ANSWERS_VERSION", {"answers/"}),
        ("kvopt.run.sampling.SAMPLES_VERSION", {"samples"}),
        ("kvopt.train.training.TRAINING_VERSION", {"students/s1"}),
        (None, set()),
    ],
)
def test_a_newer_version_of_the_code_that_computes_a_result_computes_it_again(
    measured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None, stages: set[str]
) -> None:
    config, out = measured
    out = Path(shutil.copytree(out, tmp_path / "out"))
    (out / "ledger.jsonl").unlink()
    if version is not None:
        monkeypatch.setattr(version, 2)
    with opened(config, out).opened() as run:
        run.run()
    train_students(opened(config, out))
    worked = stages_in(out) if (out / "ledger.jsonl").is_file() else []
    assert {stage.partition("/")[0] + "/" if "." in stage else stage for stage in worked} == stages
