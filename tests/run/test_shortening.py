"""``kvopt shorten`` and what else is made of shortened texts: files, board, starts, mutations, and bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvopt.config.document import load_config
from kvopt.documents.leaderboard_file import LeaderboardDocument
from kvopt.documents.shortened_file import ShortenedDocument
from kvopt.errors import InputError
from kvopt.mutate.mutation import read_mutations
from kvopt.run.run import Run
from kvopt.task.template_files import template_from_file
from tests.jobs import run_job, write_job

Kvopt = Callable[..., tuple[int, str, str]]


def plain(config: dict[str, Any]) -> None:
    """The job without mutations and learned contexts."""
    config["mutations"] = {"count": 0}
    config["contexts"] = []


def board_of(folder: Path) -> LeaderboardDocument:
    return LeaderboardDocument.model_validate(json.loads((folder / "leaderboard.json").read_text("utf-8")))


def test_shortened_texts_land_on_the_board_and_can_be_used(kvopt: Kvopt, tmp_path: Path) -> None:
    path = write_job(tmp_path / "job", plain)
    asked = ("shorten", path, "--tokens", 60, "--tokens", 80, "--rows", 3, "--exchanges", 1, "--out", "run")
    code, out, err = kvopt(*asked)
    assert code == 0, err
    assert "next: kvopt export 'run#short-60' --to text" in err
    original = load_job(path, Path("other")).inputs.template
    documents = {
        name: ShortenedDocument.model_validate(json.loads(Path("run/shortened", f"{name}.json").read_text("utf-8")))
        for name in ("short-80", "short-60")
    }
    whole = board_of(Path("run")).template_tokens
    rows = {row.name: row for row in board_of(Path("run")).contexts}
    for name, document in documents.items():
        assert document.tokens <= int(name.removeprefix("short-")) < whole == document.original_tokens
        assert rows[name].tokens == document.tokens
        assert f"{name}: {whole} -> {document.tokens} tokens" in out
        assert document.cut
        stored = template_from_file(Path("run/shortened") / f"{name}.yaml", original)
        assert stored.to_json()["messages"] == [m.model_dump() for m in document.template.messages or ()]
    assert len("".join(documents["short-60"].cut)) > len("".join(documents["short-80"].cut))
    assert (rows["short-60"].lineage.family, rows["short-60"].lineage.id) == ("extract", "")
    page = Path("run/report.html").read_text("utf-8")
    assert "shortened from the template" in page
    assert "your own prompt" not in page.lower()
    code, _, err = kvopt("export", "run#short-60", "--to", "text", "--out", "exported")
    assert code == 0, err
    again = Path("run/shortened/short-60.json").read_bytes()
    trials = Path("run/shortened/.trials.jsonl").read_bytes()
    code, _, err = kvopt(*asked)
    assert code == 0, err
    assert Path("run/shortened/.trials.jsonl").read_bytes() == trials  # nothing was run again
    assert json.loads(Path("run/shortened/short-60.json").read_bytes())["tokens"] == json.loads(again)["tokens"]
    code, _, err = kvopt("run", path, "--out", "run")
    assert code == 0, err
    assert {"short-80", "short-60"} <= {row.name for row in board_of(Path("run")).contexts}  # they stay


def load_job(path: Path, out: Path) -> Run:
    config, base_dir = load_config(path)
    return Run(config, base_dir, out, say=lambda line: None, bars=False)


def test_json_and_a_kl_that_must_hold(kvopt: Kvopt, tmp_path: Path) -> None:
    path = write_job(tmp_path / "job", plain)
    code, out, err = kvopt("shorten", path, "--keep", 0.5, "--rows", 3, "--exchanges", 1, "--out", "run", "--json")
    assert code == 0, err
    [text] = json.loads(out)["texts"]
    assert text["asked"] == "keep 0.5"
    assert text["tokens"] < text["original_tokens"]
    with load_job(path, Path("run")).opened() as run:
        from kvopt.config.shortening import ShorteningConfig

        none = run.shortener(ShorteningConfig(rows=3)).kl_of_none()
    assert text["kl_selection"] <= 0.5 * none


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what is wanted (give one of --tokens, --keep and --max-kl)"),
        (["--tokens", 9, "--keep", 0.9], "say what is wanted"),
        (["--tokens", 4000], "4000 tokens wanted, the template has"),
        (["--tokens", 2], "tokens of chat markup"),
        (["--tokens", 2, "--set", "mutations.protect=[the labels below]"], "what you marked (the labels below)"),
        (["--max-kl", 0.0], "no shorter text has a forward KL of at most 0"),
    ],
)
def test_bad_input_gets_one_line(kvopt: Kvopt, tmp_path: Path, arguments: list[object], message: str) -> None:
    path = write_job(tmp_path / "job", plain)
    code, out, err = kvopt("shorten", path, *arguments, "--rows", 2, "--exchanges", 0, "--out", "run")
    assert code == 2
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not out


def test_a_generator_and_starts_of_shortened_texts(tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["mutations"] = {
            "count": 3,
            "generator": {"kind": "extract", "tokens": [60, 80], "rows": 3, "exchanges": 1},
        }
        config["contexts"] = [
            {"name": "soft", "kind": "soft", "init": "extract:50", "steps": 0},
            {"name": "kv", "kind": "kv", "tokens": 20, "init": "salient", "steps": 0},
        ]

    path = write_job(tmp_path, change)
    board = run_job(path, tmp_path / "out")
    mutations = read_mutations(tmp_path / "out/mutations.jsonl")
    assert [m.operators for m in mutations[:2]] == [("extract-80",), ("extract-60",)]
    assert all(m.accepted and m.family == "extract" for m in mutations[:2])
    assert mutations[2].family != "extract"
    rows = {row["name"]: row for row in board["contexts"]}
    assert 0 < rows["soft"]["tokens"] <= 50
    assert rows["kv"]["tokens"] == 20
    again = run_job(path, tmp_path / "out")
    assert again == board


@pytest.mark.parametrize("where", ["generator", "init"])
def test_a_length_that_is_no_shortening_is_told_before_the_work(tmp_path: Path, where: str) -> None:
    from kvopt.run.validate import check

    def change(config: dict[str, Any]) -> None:
        plain(config)
        if where == "generator":
            config["mutations"] = {"count": 1, "generator": {"kind": "extract", "tokens": [4000]}}
        else:
            config["contexts"] = [{"name": "soft", "kind": "soft", "init": "extract:4000", "steps": 0}]

    path = write_job(tmp_path, change)
    with pytest.raises(InputError, match="4000 tokens wanted, the template has"):
        check(load_job(path, tmp_path / "out").inputs)


@pytest.mark.parametrize("init", ["extract", "extract:0", "extract:many"])
def test_an_init_that_names_no_length(tmp_path: Path, init: str) -> None:
    context = {"name": "soft", "kind": "soft", "init": init}
    path = write_job(tmp_path, lambda config: config.update(contexts=[context]))
    with pytest.raises(InputError, match="number of tokens"):
        load_config(path)
