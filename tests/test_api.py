"""kvopt from Python: the calls of kvopt.api, and that importing kvopt loads nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kvopt
from kvopt.api import _config
from kvopt.cli.starter import write_starter
from kvopt.errors import InputError
from tests.jobs import SYSTEM, rows, stages_in, write_rows
from tests.tiny import tiny_folder

TEMPLATE = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Message: {{text}}"}]
QUICK: dict[str, Any] = {"steps": 2, "batch_size": 4}


@pytest.fixture
def learn(tmp_path: Path) -> Any:
    def call(**changes: Any) -> kvopt.LearnedContext:
        options = {"template": TEMPLATE, "examples": rows(), "base": str(tiny_folder("llama")), "tokens": 6}
        return kvopt.optimize_context(**(options | {"out": tmp_path / "out"} | QUICK | changes))

    return call


def test_importing_kvopt_loads_nothing_heavy() -> None:
    code = "import sys, kvopt; print(kvopt.__version__, 'torch' in sys.modules, 'optimize_context' in dir(kvopt))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()[1:] == [
        "False",
        "True",
    ]


def test_names_that_are_not_there_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        kvopt.nonsense  # noqa: B018


def test_a_learned_context_comes_with_its_score(learn: Any) -> None:
    context = learn()
    assert (context.name, context.kind, context.tokens) == ("kv-6", "kv", 6)
    assert context.kl == context.score["kl_forward"]["mean"]
    assert context.interval[0] <= context.kl <= context.interval[1]
    assert json.loads((context.folder / "kvopt.json").read_text())["tokens"] == 6


def test_a_second_call_finds_everything_done(learn: Any, tmp_path: Path) -> None:
    first = learn()
    stages = stages_in(tmp_path / "out" / "run")
    again = learn()
    assert again.kl == first.kl
    assert stages_in(tmp_path / "out" / "run") == stages


def test_calls_with_other_arguments_rows_or_files_never_share_a_folder(
    learn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", rows()[:16])
    (tmp_path / "start.txt").write_text("Sort the message into a label.", "utf-8")
    limit = {"data": {"limit": {"selection": 3, "validation": 4}}}
    calls: list[dict[str, Any]] = [
        {},
        {"steps": 5, "learning_rate": 0.02},
        {"examples": rows()[:18]},
        {"examples": tmp_path / "rows.jsonl", "settings": limit},
        {"init": "text:start.txt", "tokens": None},
    ]
    first = [learn(**call, out=None) for call in calls]
    bytes_of = [(context.folder / "adapter_model.safetensors").read_bytes() for context in first]
    assert len({context.folder for context in first}) == len(calls)
    assert all(context.folder.parts[:1] == ("runs",) for context in first)
    write_rows(tmp_path / "rows.jsonl", rows()[:15])
    (tmp_path / "start.txt").write_text("Sort it into a label, please.", "utf-8")
    second = [learn(**call, out=None) for call in calls]
    assert [a.folder == b.folder for a, b in zip(first, second, strict=True)] == [True, True, True, False, False]
    assert [(context.folder / "adapter_model.safetensors").read_bytes() for context in first] == bytes_of


def test_a_folder_with_another_calls_results_is_refused_and_stays(learn: Any, tmp_path: Path) -> None:
    first = learn()
    with pytest.raises(InputError, match=r"holds the results of a call with other arguments \(choose another out, or"):
        learn(steps=5)
    assert learn().kl == first.kl


def test_text_templates_files_of_rows_and_validation_rows_work(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", rows()[:14])
    context = kvopt.optimize_context(
        "Sort the message into weather, music or book.\nMessage: {{text}}\nLabel:\n",
        tmp_path / "rows.jsonl",
        base=str(tiny_folder("qwen3")),
        kind="soft",
        tokens=5,
        init="strided",
        validation=rows()[14:],
        out=tmp_path / "out",
        settings={"data": {"limit": {"selection": 4}}, "model": {"dtype": "float32"}},
        **QUICK,
    )
    assert context.kind == "soft"
    assert context.score["examples"] == 6


def test_export_options_reach_the_exporter(learn: Any, tmp_path: Path) -> None:
    folder = learn().export("peft", tmp_path / "peft", peft_type="PREFIX_TUNING")
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "PREFIX_TUNING"


def test_compare_names_contexts_and_prints_a_table(tmp_path: Path) -> None:
    contexts = [{"kind": "kv", "tokens": 6, **QUICK}, {"kind": "soft", "tokens": 4, "name": "mine", **QUICK}]
    found = kvopt.compare_contexts(
        TEMPLATE, rows(), base=str(tiny_folder("llama")), contexts=contexts, mutations=2, out=tmp_path / "out"
    )
    assert {"original", "none", "kv-6", "mine"} < {row["name"] for row in found.rows}
    assert sum(row["name"].startswith("m0") for row in found.rows) == 2
    assert (found.folder / "leaderboard.json").is_file()
    assert len(str(found).splitlines()) == len(found.rows) + 1


def test_compare_takes_a_wording_of_the_callers_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("Sort it.", "utf-8")
    result = kvopt.compare_contexts(
        TEMPLATE, rows(), base=str(tiny_folder("llama")), contexts=[{"text": "mine.txt"}], mutations=0, out="out"
    )
    assert {row["name"] for row in result.rows} == {"original", "none", "mine"}


def test_what_is_wrong_is_one_line(learn: Any, tmp_path: Path) -> None:
    for changes, message in [
        ({"kind": "lora"}, "contexts.0.kind"),
        ({"template": "no slot"}, "no slots"),
        ({"examples": [{"text": "x"}]}, "output"),
        ({"stepz": 3}, "did you mean 'steps'"),
        ({"base": "/nowhere"}, "no such folder"),
        ({"examples": [{"text": float("nan"), "output": "x"}] * 8}, "examples: rows must be mappings of plain values"),
        ({"examples": [{"text": {1}, "output": "x"}] * 8}, "examples: rows must be mappings of plain values"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            learn(**changes, out=tmp_path / message.replace(" ", "-").replace(".", "-"))
        assert "\n" not in str(caught.value)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(InputError, match="already exists and is not from such a call"):
        learn(out=tmp_path / "mine")


def test_a_project_of_the_user_is_not_written_over(learn: Any, tmp_path: Path) -> None:
    """The folder of ``kvopt init`` holds a kvopt.yaml too."""
    write_starter(tmp_path / "project", force=False)
    before = {path.name: path.read_bytes() for path in (tmp_path / "project").iterdir()}
    with pytest.raises(InputError, match="already exists and is not from such a call"):
        learn(out=tmp_path / "project")
    assert {path.name: path.read_bytes() for path in (tmp_path / "project").iterdir()} == before


def test_a_call_that_failed_can_be_put_right(learn: Any) -> None:
    with pytest.raises(InputError, match="validation: rows must be"):
        learn(validation=[{"text": {1}, "output": "x"}])
    assert learn(validation=rows()[14:], examples=rows()[:14]).score["examples"] == 6


def test_paths_of_a_call_are_those_of_the_current_folder(
    learn: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = learn(out="first")
    again = learn(out="again", init=f"context:{first.folder}", steps=0, tokens=None, name="again")
    assert again.kl == pytest.approx(first.kl, rel=1e-6)
    folder = kvopt.export_context("first/run#original", "trl-dataset", "rows", config="first/kvopt.yaml")
    assert (folder / "train.jsonl").is_file()
    base = str(tiny_folder("llama"))
    assert base in (kvopt.export_context(first.folder, "hf-cache", "cache", base=base) / "README.md").read_text()


def test_a_path_in_contexts_that_stand_in_a_tuple_is_of_the_current_folder_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("shorter.txt").write_text("Message: {{text}}", "utf-8")
    contexts = ({"name": "kv", "kind": "kv", "init": "text:shorter.txt"},)
    (entry,) = _config(TEMPLATE, "base", {"contexts": contexts})["contexts"]
    assert entry["init"] == f"text:{tmp_path / 'shorter.txt'}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contexts": ["kv"]}, r"contexts\.0: must be a mapping, not 'kv'"),
        ({"contexts": {"kind": "kv"}}, r"contexts: must be a list"),
        ({"contexts": None}, r"contexts: must be a list, not None"),
        ({"settings": [1]}, "settings: must be a mapping"),
        ({"mutations": "8"}, r"mutations: must be a mapping, not '8'"),
        ({"template": ["Message: {{text}}"]}, r"template\.0: must be a mapping"),
        ({"template": None}, "template: must be text or chat messages"),
        ({"examples": None}, "examples: must be"),
        ({"examples": [1]}, "examples: rows must be mappings"),
        ({"settings": {"contexts": [1]}}, "contexts.0: "),
        ({"settings": {"contexts": "kv"}}, "contexts: "),
    ],
)
def test_arguments_of_another_shape_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    arguments = {"template": TEMPLATE, "examples": rows(), "base": str(tiny_folder("llama"))} | changes
    with pytest.raises(InputError, match=message):
        kvopt.compare_contexts(**arguments, out=tmp_path / "out")
