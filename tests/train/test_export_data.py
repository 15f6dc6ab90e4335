"""The exported training set: rows, bytes, refusals, and that plain TRL reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import load_dataset
from typer.testing import CliRunner

from kvopt.cli import app
from kvopt.config.document import load_config
from kvopt.config.names import ORDERS, ContextName
from kvopt.errors import InputError
from kvopt.export.training_rows import choices_of, export_rows
from kvopt.run.inputs import read_inputs
from kvopt.run.run import Run
from tests.jobs import rows, run_job, write_job, write_rows
from tests.tiny import tiny_tokenizer

OUTPUTS = ["weather", "  spaced ", 'quoted "x"\n{"a": {{1}}}\n', "Ünïcödé 😀 \\{{text}}"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A job whose run is done: its config and its run directory."""
    folder = tmp_path_factory.mktemp("job")

    def change(config: dict[str, Any]) -> None:
        config["contexts"] = []
        config["students"] = [
            {"name": "mixed", "contexts": ["original", {"context": "best-mutations:2", "weight": 2}]},
            {"name": "random", "contexts": ["random-mutations:2"], "seed": 5},
        ]

    job = write_job(folder, change)
    run_job(job, folder / "out")
    return job, folder / "out"


def exported(
    job: Path, out: Path, student: str | None = None, *contexts: str, format: str = "prompt-completion"
) -> list:
    config, base_dir = load_config(job)
    inputs = read_inputs(config, base_dir)
    choices, seed = choices_of(inputs, student, contexts)
    return list(export_rows(inputs, out, choices, seed, format))


def test_every_training_row_stands_under_every_context_as_often_as_it_weighs(finished: tuple[Path, Path]) -> None:
    job, out = finished
    found = exported(job, out, "mixed")
    config, base_dir = load_config(job)
    train = read_inputs(config, base_dir).dataset.train
    names = list(dict.fromkeys(row["context_id"] for row in found))
    assert names[0] == "original"
    assert len(names) == 3
    assert len(found) == 5 * len(train)
    for name, copies in zip(names, (1, 2, 2), strict=True):
        ids = [row["example_id"] for row in found if row["context_id"] == name]
        assert sorted(ids) == sorted(copies * [example.id for example in train])


def test_best_mutations_are_those_that_the_run_ranked_first(finished: tuple[Path, Path]) -> None:
    job, out = finished
    board = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    ranked = sorted((r["kl_forward"]["mean"], r["context"]) for r in board if r["split"] == "selection")
    found = exported(job, out, None, "best-mutations:2")
    assert list(dict.fromkeys(row["context_id"] for row in found)) == [name for _, name in ranked[:2]]


def test_training_and_export_choose_the_same_mutations(finished: tuple[Path, Path]) -> None:
    job, out = finished
    config, base_dir = load_config(job)
    run = Run(config, base_dir, out, say=lambda line: None)
    with run.opened():
        for order in ORDERS:
            spec = f"{order}-mutations:2"
            name = ContextName.parse(spec, "test")
            trained = run.catalogue([name]).named(name, "test", seed=config.seed)
            written = exported(job, out, None, spec)
            assert [context.name for context in trained] == list(dict.fromkeys(row["context_id"] for row in written))


def test_prompts_are_the_filled_template_and_outputs_keep_their_bytes(tmp_path: Path) -> None:
    job = write_job(tmp_path, lambda config: config.update(mutations={"count": 0}, contexts=[]))
    data = [{"text": f"a {{{{text}}}} {i}", "output": output} for i, output in enumerate(OUTPUTS)] + rows()[:8]
    write_rows(tmp_path / "train.jsonl", data)
    found = exported(job, tmp_path / "out", None, "original")
    for row in found:
        number = int(row["example_id"].rpartition(":")[2])
        (completion,) = row["completion"]
        assert completion == {"role": "assistant", "content": data[number]["output"]}
        assert row["prompt"][-1] == {"role": "user", "content": f"Message: {data[number]['text']}"}
    messages = exported(job, tmp_path / "out", None, "original", format="messages")
    assert [row["messages"] for row in messages] == [row["prompt"] + row["completion"] for row in found]


def test_a_plain_text_template_gives_text(tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config.update(template={"text": "Sort it.\n{{text}}\nLabel: "}, mutations={"count": 0}, contexts=[])

    job = write_job(tmp_path, change)
    (tmp_path / "other.txt").write_text("Name the label.\n{{text}}\nIt is: ")
    first, *_, last = exported(job, tmp_path / "out", None, "original", f"text:{tmp_path / 'other.txt'}")
    assert first["prompt"].startswith("Sort it.\n")
    assert (last["context_id"], last["prompt"][:16]) == ("other", "Name the label.\n")
    with pytest.raises(InputError, match="has no messages"):
        exported(job, tmp_path / "out", None, "original", format="messages")


@pytest.mark.parametrize(
    ("contexts", "reason"),
    [
        (["kv-8"], "a learned context has no text"),
        (["none"], "has no prompt to write"),
        (["m999"], "no context 'm999'"),
        (["best-mutations:x"], "needs a number"),
        (["best-mutations:9"], "9 mutations are wanted, but there are only 3"),
        (["original", "original"], "is given twice"),
        (["text:missing.txt"], "missing.txt"),
    ],
)
def test_what_has_no_text_or_is_not_there_is_refused(
    finished: tuple[Path, Path], contexts: list[str], reason: str, tmp_path: Path
) -> None:
    job, out = finished
    config = yaml.safe_load(job.read_text())
    config["contexts"] = [{"name": "kv-8"}]
    other = job.with_name("learned.yaml")
    other.write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match=reason):
        exported(other, out, None, *contexts)


def test_mutations_of_another_template_or_no_run_are_refused(finished: tuple[Path, Path], tmp_path: Path) -> None:
    job, out = finished
    with pytest.raises(InputError, match="there is no run with mutations"):
        exported(job, tmp_path, "mixed")
    config = yaml.safe_load(job.read_text())
    config["template"]["messages"][0]["content"] = "Another."
    other = job.with_name("another.yaml")
    other.write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match="the run was made with another template"):
        exported(other, out, "mixed")


@pytest.mark.parametrize("damaged", ["{", "[1]", '{"template_sha256": 3}'])
def test_a_damaged_manifest_is_named_in_one_line(finished: tuple[Path, Path], damaged: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(damaged, "utf-8")
    with pytest.raises(InputError, match=r"manifest\.json: (cannot be read|is damaged)"):
        exported(finished[0], tmp_path, "mixed")


def test_the_student_must_be_clear(finished: tuple[Path, Path]) -> None:
    job, out = finished
    with pytest.raises(InputError, match="several students"):
        exported(job, out)
    with pytest.raises(InputError, match="no student 'x'"):
        exported(job, out, "x")
    with pytest.raises(InputError, match="not both"):
        exported(job, out, "mixed", "original")
    assert exported(job, out, "random") == exported(job, out, "random")


def test_the_command_writes_jsonl_that_datasets_reads(finished: tuple[Path, Path], tmp_path: Path) -> None:
    job, out = finished
    file = tmp_path / "deep" / "sft.jsonl"
    arguments = ["export-data", str(job), "--out", str(file), "--student", "mixed", "--run", str(out), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    loaded = load_dataset("json", data_files=str(file), cache_dir=str(tmp_path / "cache"))["train"]
    assert report["rows"] == len(loaded) == sum(report["contexts"].values())
    assert loaded.to_list() == exported(job, out, "mixed")


@pytest.mark.parametrize("format", ["prompt-completion", "messages"])
def test_plain_trl_reads_it(finished: tuple[Path, Path], format: str) -> None:
    from trl.data_utils import apply_chat_template, is_conversational

    job, out = finished
    tokenizer = tiny_tokenizer("chatml")
    for row in exported(job, out, "mixed", format=format)[::7]:
        assert is_conversational(row)
        text = apply_chat_template(row, tokenizer)
        whole = text["prompt"] + text["completion"] if format == "prompt-completion" else text["text"]
        answer = row["completion"][0]["content"] if format == "prompt-completion" else row["messages"][-1]["content"]
        assert whole.endswith(f"<|im_start|>assistant\n{answer}<|im_end|>\n")
