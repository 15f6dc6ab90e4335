"""The JSON files that kvopt writes, against the schemas that ``kvopt config --schema DOCUMENT`` prints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from kvopt.base.loading import stored_base
from kvopt.config.document import load_config
from kvopt.config.shortening import ShorteningConfig
from kvopt.documents.schemas import DOCUMENTS, schema_of
from kvopt.export.derive import truncate
from kvopt.export.writing import export
from kvopt.run.frontier import Question, make_frontier
from kvopt.storage.files import canonical_json
from kvopt.train.commands import conduct_study, evaluate_all, train_chosen
from kvopt.train.merging.folders import scaled_student
from kvopt.train.training import chosen
from tests.train.evaluated import open_evaluated, student, write_evaluated

FILES = {
    "leaderboard": "leaderboard.json",
    "scores": "scores.jsonl",
    "samples": "samples.json",
    "answers": "answers.json",
    "evaluation": "students/*/evaluation.json",
    "study": "study.json",
    "frontier": "frontier/frontier.json",
    "shortened": "frontier/shortened/*.json",
    "context": "contexts/*/kvopt.json",
    "student": "students/*/kvopt-student.json",
    "export": "exports/*/kvopt-export.json",
    "manifest": "manifest.json",
    "ledger": "ledger.jsonl",
}
"""Where each document lies in the folder of :func:`finished`; sequences: tests/train/test_sequence.py."""

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with students, a study, exports, a shortened context, a frontier and a scaled student."""

    def whole(config: dict[str, Any]) -> None:
        config["students"] = [
            student("lora", "original", "kv-8"),
            student("full", "original", "random-mutations:1", method="full")
            | {"schedule": {"kind": "state-adaptive", "rows": 4}},
        ]
        config["study"] = {"seeds": [0, 1], "arms": ["lora"], "curve": {"counts": [0, 1]}}

    place = tmp_path_factory.mktemp("documents")
    out = place / "out"
    path = write_evaluated(place, whole)
    run = open_evaluated(path, out)
    with run.opened():
        run.run()
        train_chosen(run, chosen(run.inputs))
        evaluate_all(run)
        conduct_study(run)
    for kind, name in (("peft", "kv-8"), ("hf-cache", "kv-8"), ("text", "original")):
        export(f"{out}#{name}", kind, out / "exports" / kind)
    question = Question(kinds=("text", "kv"), max_kl=0.5, steps=0, how=ShorteningConfig(rows=2, exchanges=0))
    make_frontier(*load_config(path), out / "frontier", question, say=lambda line: None)
    truncate(str(out / "contexts" / "kv-8"), 4, out / "contexts" / "short", by="first")
    scaled_student(
        out / "students" / "lora", stored_base(run.config.model), out / "students" / "scaled", alpha=0.5, beta=0.5
    )
    return out


def texts(folder: Path, name: str) -> list[str]:
    """Every file of a kind, or every line of one."""
    paths = sorted(folder.glob(FILES[name]))
    return [
        text
        for path in paths
        for text in (path.read_text("utf-8").splitlines() if path.suffix == ".jsonl" else [path.read_text("utf-8")])
    ]


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_valid_under_its_schema(finished: Path, name: str) -> None:
    schema = schema_of(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    documents = [json.loads(text) for text in texts(finished, name)]
    assert documents
    for document in documents:
        jsonschema.validate(document, schema)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_read_and_written_again_has_the_same_bytes(finished: Path, name: str) -> None:
    for text in texts(finished, name):
        document = DOCUMENTS[name].model_validate(json.loads(text)).to_json()
        if name == "ledger":
            assert canonical_json(document) == text
        elif name == "scores":
            assert json.dumps(document, ensure_ascii=False) == text
        elif "origin" not in document:  # a context made of others keeps the entries of its source in another order
            assert json.dumps(document, indent=2, ensure_ascii=False) + "\n" == text
        else:
            assert document == json.loads(text)


def test_every_kind_of_document_is_looked_at_here_or_with_the_sequences() -> None:
    assert {*FILES, "sequence"} == set(DOCUMENTS)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("leaderboard", lambda d: d["contexts"][0]["kl_forward"].update(mean="near")),
        ("leaderboard", lambda d: d["contexts"][0].pop("gold_nll")),
        ("leaderboard", lambda d: d["contexts"][0].update(kind="image")),
        ("leaderboard", lambda d: d["rows"].update(validation=1.5)),
        ("leaderboard", lambda d: d.pop("noise_floor")),
        ("scores", lambda d: d["kl_forward"].update(ci95=[0.1])),
        ("scores", lambda d: d.update(tokens=True)),
        ("samples", lambda d: d["examples"][0]["reference"]["top"].__setitem__(0, [])),
        ("samples", lambda d: d["examples"][0]["contexts"]["kv-8"].update(agree="yes")),
        ("evaluation", lambda d: d["contexts"][0]["quantities"]["gold_nll"].update(mean="0.5")),
        ("evaluation", lambda d: d["groups"][0].pop("group")),
        ("study", lambda d: d["arms"][0]["values"]["original/gold_nll"].pop("mean")),
        ("study", lambda d: d.update(complete="yes")),
        ("study", lambda d: d.update(curve={"original/gold_nll": {"values": {"0": []}}})),
        ("context", lambda d: d.update(name="../../evil")),
        ("context", lambda d: d.update(kind="text")),
        ("context", lambda d: d.update(tokens=-1)),
        ("student", lambda d: d.update(steps="4")),
        ("student", lambda d: d.update(base={"weights": 3})),
        ("export", lambda d: d.pop("snippet")),
        ("manifest", lambda d: d.update(stages=["reference"])),
        ("ledger", lambda d: d.pop("outcome")),
    ],
)
def test_a_wrong_file_is_refused_by_schema_and_reader(finished: Path, name: str, change: Change) -> None:
    document = json.loads(texts(finished, name)[0])
    change(document)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema_of(name))
    with pytest.raises(ValidationError):
        DOCUMENTS[name].model_validate(document)


def test_what_older_versions_did_not_write_has_a_default(finished: Path) -> None:
    [text] = texts(finished, "leaderboard")
    document = json.loads(text)
    for key in ("split", "selected_on", "template", "rows_sha256", "other_mutations"):
        del document[key]
    del document["contexts"][0]["gold_nll_ci95"]
    del document["noise_floor"]["batch_sizes"]
    older = deepcopy(document)
    board = DOCUMENTS["leaderboard"].model_validate(document)
    assert (board.split, board.template, board.other_mutations) == ("validation", None, [])  # type: ignore[attr-defined]
    assert board.to_json() == older, "a default is not written into a file that did not have it"
    jsonschema.validate(older, schema_of("leaderboard"))


def test_entries_of_newer_versions_are_kept(finished: Path) -> None:
    document = json.loads(texts(finished, "context")[0]) | {"mood": {"happy": [1, None]}}
    assert DOCUMENTS["context"].model_validate(document).to_json() == document


def test_every_entry_of_a_schema_says_what_it_holds() -> None:
    silent = [
        f"{name}: {part}.{key}"
        for name in DOCUMENTS
        for part, definition in {**schema_of(name).get("$defs", {}), name: schema_of(name)}.items()
        for key, entry in definition["properties"].items()
        if "description" not in entry and "$ref" not in entry
    ]
    assert not silent


def test_the_command_prints_the_schema_of_a_document(kvopt: Any) -> None:
    for name in DOCUMENTS:
        code, out, _ = kvopt("config", "--schema", name)
        assert code == 0
        assert json.loads(out) == schema_of(name)
    code, out, _ = kvopt("config", "--schema")
    assert "template" in json.loads(out)["properties"], "without a name, the schema is that of the config"
    _, out, _ = kvopt("config", "--help")
    assert all(name in out for name in DOCUMENTS)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--schema", "leaderbord"), "no document 'leaderbord' (did you mean 'leaderboard'?"),
        (("--schema", "nothing"), "known: leaderboard, scores, samples"),
        (("leaderboard",), "kvopt config --schema leaderboard"),
        (("--reference", "leaderboard"), "kvopt config --schema leaderboard"),
    ],
)
def test_a_schema_that_does_not_exist_is_one_line(kvopt: Any, arguments: tuple[str, ...], line: str) -> None:
    code, out, err = kvopt("config", *arguments)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert line in err


def test_a_samples_file_that_is_damaged_is_written_again(finished: Path, tmp_path: Path) -> None:
    """Damage that is still JSON: the key alone does not make it good."""
    shutil.copytree(finished.parent, tmp_path / "job")
    out = tmp_path / "job" / "out"
    whole = (out / "samples.json").read_bytes()
    document = json.loads(whole)
    del document["examples"][0]["contexts"]["kv-8"]["kl"]
    (out / "samples.json").write_text(json.dumps(document), "utf-8")
    run = open_evaluated(tmp_path / "job" / "job.yaml", out)
    with run.opened():
        run.run()
    assert (out / "samples.json").read_bytes() == whole
