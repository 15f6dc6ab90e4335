"""Nothing that took time is deleted: it is put aside, told, listed, taken up again, and deleted by ``kvopt clean``."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvopt.cli import app
from kvopt.config.document import load_config
from kvopt.run.directory import RunDirectory
from kvopt.run.put_aside import Kept
from kvopt.run.run import Run
from kvopt.storage.keyed_rows import stored_rows, write_rows
from kvopt.train.commands import evaluate_all, set_aside_others, train_students
from tests.jobs import artefacts, stages_in, write_job
from tests.tiny import save_tiny
from tests.train.evaluated import student

runner = CliRunner()


def run(config: Path, out: Path, *sets: str) -> list[str]:
    """A whole run; returns what it said of results that it moved."""
    loaded, base_dir = load_config(config, sets)
    lines: list[str] = []
    with Run(loaded, base_dir, out, say=lines.append, bars=False).opened() as opened:
        opened.run()
    return moves(lines)


def moves(lines: list[str]) -> list[str]:
    return [line.partition(",")[0] for line in lines if line.startswith(("put aside", "taken up again"))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("kept")
    config = write_job(place, lambda c: c.update(contexts=[c["contexts"][0], c["contexts"][2]]))
    assert run(config, place / "out") == []
    return config, place / "out"


@pytest.fixture
def job(finished: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path, dict[str, bytes]]:
    """A finished run to change, and its bytes."""
    out = Path(shutil.copytree(finished[1], tmp_path / "out"))
    (out / "ledger.jsonl").unlink()
    return finished[0], out, artefacts(out)


def kept_names(out: Path) -> list[str]:
    return [result.record.stage for result in Kept(out).results()]


def test_what_a_config_does_not_name_is_put_aside_and_taken_up_when_it_does(job: Any) -> None:
    config, out, before = job
    said = run(config, out, "contexts=[]", "mutations.count=0")
    assert said == ["put aside: contexts/kv-8", "put aside: contexts/soft-6", "put aside: mutations"]
    assert not (out / "mutations.jsonl").exists()
    assert list((out / "contexts").iterdir()) == []
    assert [row["name"] for row in json.loads((out / "leaderboard.json").read_text())["contexts"]] == [
        "original", "none",
    ]  # fmt: skip
    (out / "ledger.jsonl").unlink()
    said = run(config, out)
    assert sorted(said) == [
        "taken up again: contexts/kv-8",
        "taken up again: contexts/soft-6",
        "taken up again: mutations",
    ]
    assert artefacts(out) == before
    assert not (out / ".kept").exists()
    assert [stage for stage in stages_in(out) if not stage.startswith("samples")] == [], "nothing is computed again"


def test_other_settings_put_the_earlier_context_aside_and_back_again(job: Any) -> None:
    config, out, before = job
    more = config.with_name("more.yaml")
    more.write_text(config.read_text().replace("steps: 6", "steps: 4"))
    assert run(more, out) == ["put aside: contexts/kv-8"]
    assert kept_names(out) == ["contexts/kv-8"]
    assert run(config, out) == ["put aside: contexts/kv-8", "taken up again: contexts/kv-8"]
    assert artefacts(out) == before
    assert kept_names(out) == ["contexts/kv-8"]
    assert run(more, out) == ["put aside: contexts/kv-8", "taken up again: contexts/kv-8"]


def test_a_descent_that_was_stopped_keeps_its_state_under_its_own_key(job: Any, tmp_path: Path) -> None:
    config, out, _ = job
    state = out / ".state" / "kv-8.safetensors"
    state.parent.mkdir()
    shutil.move(out / "contexts" / "kv-8", tmp_path / "learned")
    state.write_bytes(b"of six steps")
    run(config, out, "contexts=[]")
    assert not state.exists()
    (result,) = [one for one in Kept(out).results() if one.record.stage == "contexts/kv-8"]
    assert result.paths == [".state/kv-8.safetensors"]
    assert (result.folder / result.paths[0]).read_bytes() == b"of six steps"


def test_other_data_keep_everything_that_was_learned_and_scored(job: Any) -> None:
    config, out, before = job
    said = run(config, out, "data.limit.train=10")
    assert set(said) >= {
        "put aside: contexts/kv-8", "put aside: contexts/soft-6", "put aside: mutations", "put aside: reference",
    }  # fmt: skip
    run(config, out)
    after = artefacts(out)
    assert {name: after[name] for name in before} == before


def test_fewer_mutations_keep_the_others_for_later(job: Any) -> None:
    config, out, before = job
    run(config, out, "mutations.count=1")
    assert len((out / "mutations.jsonl").read_bytes()) < len(before["mutations.jsonl"])
    run(config, out)
    assert artefacts(out) == before


def test_inspect_lists_and_clean_deletes_what_is_put_aside_and_nothing_else(job: Any) -> None:
    config, out, _ = job
    run(config, out, 'contexts=[{"name": "kv-8", "tokens": 8, "init": "strided", "steps": 1}]', "mutations.count=0")
    stays = artefacts(out)
    facts = json.loads(runner.invoke(app, ["inspect", str(out), "--json"]).stdout)
    assert facts["what"] == "run"
    assert [one["stage"] for one in facts["kept"]] == ["contexts/kv-8", "contexts/soft-6", "mutations"]
    size = sum(path.stat().st_size for path in (out / ".kept").rglob("*") if path.is_file())
    assert sum(one["bytes"] for one in facts["kept"]) == size
    shown = runner.invoke(app, ["clean", str(out), "--dry-run"])
    assert shown.exit_code == 0
    assert "put aside (3 results" in shown.stdout
    assert "nothing is deleted" in shown.stdout
    assert len(kept_names(out)) == 3
    assert "all of this is deleted" in runner.invoke(app, ["clean", str(out)]).stdout
    assert not (out / ".kept").exists()
    assert artefacts(out) == stays
    assert runner.invoke(app, ["clean", str(out)]).stdout == "nothing is put aside\n"
    refused = runner.invoke(app, ["clean", str(out / "contexts")])
    assert "is not a run directory" in str(refused.exception)


def test_a_context_that_kvopt_did_not_learn_there_is_put_aside_too(job: Any) -> None:
    config, out, _ = job
    shutil.copytree(out / "contexts" / "kv-8", out / "contexts" / "mine")
    (out / "contexts" / "other-tool").mkdir()
    (out / "contexts" / "other-tool" / "adapter_config.json").write_text("{}")
    assert run(config, out) == ["put aside: contexts/mine", "put aside: contexts/other-tool"]
    assert (out / Kept(out).results()[1].folder / "contexts/other-tool/adapter_config.json").read_text() == "{}"


@pytest.mark.parametrize("stops_at", range(1, 8))
def test_a_process_that_dies_between_two_renames_loses_and_mixes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops_at: int
) -> None:
    """One stage with two artefacts goes from key a to b and back; the process dies at every rename, and starts anew."""

    def work(key: str) -> None:
        directory = RunDirectory(tmp_path / "run")
        with directory.locked():
            directory.manifest.format_version = 1
            directory.begin("contexts/c", key, "contexts/c", ".state/c")
            for name in ("contexts/c", ".state/c"):
                place = tmp_path / "run" / name
                if not place.exists():
                    place.mkdir(parents=True)
                    (place / "of").write_text(key)
                assert (place / "of").read_text() == key

    class Killed(BaseException):
        pass

    work("aaaa")
    work("bbbb")
    renamed, calls = os.rename, 0

    def rename(source: Any, target: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == stops_at:
            raise Killed
        renamed(source, target)

    monkeypatch.setattr(os, "rename", rename)
    try:
        work("aaaa")
        died = False
    except Killed:
        died = True
    assert died == (stops_at <= 4)
    monkeypatch.setattr(os, "rename", renamed)
    for key in ("aaaa", "bbbb", "aaaa"):
        work(key)
    assert kept_names(tmp_path / "run") == ["contexts/c"]


def test_rows_of_another_key_are_put_aside_and_come_back(tmp_path: Path) -> None:
    lines: list[str] = []
    directory = RunDirectory(tmp_path, say=lines.append)
    paths = [tmp_path / "students" / "base" / "evaluation" / f"{name}.jsonl" for name in ("a", "b")]
    for path in paths:
        write_rows(path, "first", [{"answer": "1"}])
    for path in paths:
        assert directory.rows(path, "second", 1) is None
        write_rows(path, "second", [{"answer": "2"}])
        assert directory.rows(path, "second", 1) == [{"key": "second", "answer": "2"}]
    assert moves(lines) == ["put aside: students/base/evaluation/a.jsonl"], "one line for a folder"
    assert directory.rows(paths[0], "first", 1) == [{"key": "first", "answer": "1"}]
    assert stored_rows(paths[1], "second", 1) is not None
    paths[1].write_text("{damaged")
    assert directory.rows(paths[1], "second", 1) is None
    assert len(directory.kept.results()) == 2, "what is damaged is not kept"


def test_students_with_what_was_measured_of_them_are_put_aside_and_back(tmp_path: Path) -> None:
    config = write_job(
        tmp_path,
        lambda c: c.update(
            contexts=[],
            students=[student("s1", "original")],
            evaluate={"rows": 2, "max_new_tokens": 2, "resamples": 100},
        ),
    )

    def do(*sets: str) -> list[str]:
        loaded, base_dir = load_config(config, sets)
        lines: list[str] = []
        opened = Run(loaded, base_dir, tmp_path / "out", say=lines.append, bars=False)
        if loaded.students:
            train_students(opened)
        with Run(loaded, base_dir, tmp_path / "out", say=lines.append, bars=False).opened() as again:
            set_aside_others(again)
            evaluate_all(again)
        return moves(lines)

    assert do() == []
    before = artefacts(tmp_path / "out")
    assert do("students=[]") == ["put aside: students/s1"]
    assert not (tmp_path / "out" / "students" / "s1").exists()
    assert do() == ["taken up again: students/s1"]
    assert artefacts(tmp_path / "out") == before
    assert do("evaluate.max_new_tokens=3") == [
        "put aside: students/base/evaluation/original.jsonl", "put aside: students/s1/evaluation/original.jsonl",
    ]  # fmt: skip
    assert [line.partition("/evaluation")[0] for line in do()] == [
        f"{what}: students/{name}" for name in ("base", "s1") for what in ("put aside", "taken up again")
    ]
    assert artefacts(tmp_path / "out") == before


def test_another_base_keeps_what_belongs_to_the_first(job: Any, tmp_path: Path) -> None:
    config, out, before = job
    save_tiny(tmp_path / "other", "llama", "chatml", num_hidden_layers=2)
    run(config, out, f"model.base={tmp_path / 'other'}")
    run(config, out)
    after = artefacts(out)
    assert {name: after[name] for name in before} == before
