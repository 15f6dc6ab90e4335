"""``kvopt export-data``: the formats of rows, and what TRL makes of them beside our own ids and labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvopt.cli import app
from kvopt.config.document import load_config
from kvopt.errors import InputError
from kvopt.export.row_formats import FORMATS
from kvopt.export.training_rows import choices_of, encoder_of, export_rows
from kvopt.export.trl_check import trl_differences
from kvopt.run.inputs import inputs_of_run, read_inputs
from kvopt.run.run import Run
from tests.jobs import run_job, write_job
from tests.run.test_select_by import selecting
from tests.tiny import TOKENIZERS, tiny_folder

PLAIN = {"text": "Sort it.\n{{text}}\nLabel:\n"}


def bare(config: dict[str, Any], **changes: Any) -> None:
    config.update({"contexts": [], "mutations": {"count": 0}} | changes)


def job_of(folder: Path, tokenizer: str) -> Path:
    def change(config: dict[str, Any]) -> None:
        bare(config, **({"template": PLAIN} if tokenizer == "plain" else {}))
        config["model"]["base"] = str(tiny_folder("llama", tokenizer))

    return write_job(folder, change)


def rows_of(job: Path, out: Path, format: str, *contexts: str) -> list[dict[str, Any]]:
    inputs = read_inputs(*load_config(job))
    choices, seed = choices_of(inputs, None, contexts)
    return list(export_rows(inputs, out, choices, seed, format))


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["export-data", *arguments])


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return job_of(tmp_path_factory.mktemp("job"), "chatml")


@pytest.mark.parametrize(
    ("tokenizer", "format"),
    [(tokenizer, "tokens") for tokenizer in TOKENIZERS] + [(t, "text") for t in ("chatml", "gemma", "plain")],
)
def test_trl_trains_on_exactly_our_ids_and_labels(tmp_path: Path, tokenizer: str, format: str) -> None:
    path = job_of(tmp_path, tokenizer)
    done = invoke(str(path), "--out", str(tmp_path / "r.jsonl"), "--format", format, "--verify", "trl", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["trl"] == []
    inputs = read_inputs(*load_config(path))
    encoder = encoder_of(inputs, tmp_path)
    for row, example in zip(rows_of(path, tmp_path, "tokens"), inputs.dataset.train, strict=True):
        prompt, _, gold = encoder.prompt_and_gold(inputs.template, example)
        assert row["input_ids"] == [*prompt, *gold]
        assert row["labels"] == [-100] * len(prompt) + [*gold]


def test_what_trl_does_with_messages_is_said_row_by_row(job: Path, tmp_path: Path) -> None:
    done = invoke(str(job), "--out", str(tmp_path / "r.jsonl"), "--format", "messages", "--verify", "trl")
    assert done.exit_code == 0, done.output
    count = len(rows_of(job, tmp_path, "messages"))
    assert f"TRL: {count} of {count} rows with other tokens or labels than kvopt train" in done.stdout
    first = rows_of(job, tmp_path, "tokens")[0]
    more = first["labels"].count(-100) + 1  # the prompt, and the line end behind the turn
    assert f"row 0 (original, {first['example_id']}): +1 tokens, the loss counts +{more} tokens" in done.stdout
    assert "trains on whole messages, the prompt too" in done.output
    assert "**TRL trains on whole messages, the prompt too**" in (tmp_path / "r.jsonl.md").read_text("utf-8")


def test_prompt_completion_has_one_token_more_under_trl(job: Path, tmp_path: Path) -> None:
    done = invoke(str(job), "--out", str(tmp_path / "r.jsonl"), "--verify", "trl", "--json")
    found = json.loads(done.stdout)["trl"]
    assert len(found) == len(rows_of(job, tmp_path, "tokens"))
    assert {(d["tokens"], d["changed"], d["labels"]) for d in found} == {(1, 0, 1)}


def test_a_wrong_label_is_found(job: Path, tmp_path: Path) -> None:
    ours = rows_of(job, tmp_path, "tokens")
    rows = json.loads(json.dumps(ours))
    rows[2]["labels"][-1] = -100
    rows[3]["input_ids"][0] += 1
    tokenizer = encoder_of(read_inputs(*load_config(job)), tmp_path).tokenizer
    found = trl_differences(rows, ours, tokenizer, "tokens", None)
    assert [(d.row, d.tokens, d.changed, d.labels) for d in found] == [(2, 0, 0, -1), (3, 0, 1, 0)]


def test_sharegpt_and_alpaca_hold_the_same_words(job: Path, tmp_path: Path) -> None:
    messages = rows_of(job, tmp_path, "messages")
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    for row, share, alpaca in zip(
        messages, rows_of(job, tmp_path, "sharegpt"), rows_of(job, tmp_path, "alpaca"), strict=True
    ):
        turns = [{"role": roles[t["from"]], "content": t["value"]} for t in share["conversations"]]
        assert turns == row["messages"]
        assert [alpaca[key] for key in ("system", "instruction", "output")] == [t["content"] for t in row["messages"]]
        assert alpaca["input"] == ""


def test_earlier_turns_are_the_history_of_alpaca(tmp_path: Path) -> None:
    turns = [("user", "A song."), ("assistant", "music"), ("user", "{{text}}")]
    messages = [{"role": role, "content": content} for role, content in turns]
    path = write_job(tmp_path, lambda config: bare(config, template={"messages": messages}))
    row = rows_of(path, tmp_path, "alpaca")[0]
    assert row["history"] == [["A song.", "music"]]
    assert "system" not in row
    odd = write_job(tmp_path / "b", lambda config: bare(config, template={"messages": [messages[0], messages[2]]}))
    with pytest.raises(InputError, match="user and assistant in turn"):
        rows_of(odd, tmp_path, "alpaca")


@pytest.mark.parametrize("format", list(FORMATS))
def test_every_format_has_a_page_with_stanzas_beside_it(job: Path, tmp_path: Path, format: str) -> None:
    assert invoke(str(job), "--out", str(tmp_path / "r.jsonl"), "--format", format).exit_code == 0
    page = (tmp_path / "r.jsonl.md").read_text("utf-8")
    for name in ("TRL", "axolotl", "LLaMA-Factory", "unsloth"):
        assert f"## {name}\n" in page
    for language, check in (("python", lambda code: compile(code, "page", "exec")), ("json", json.loads)):
        for block in page.split(f"```{language}\n")[1:]:
            check(block.split("```")[0])


def test_bad_input_is_one_line(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = ["--out", str(tmp_path / "r.jsonl")]
    plain = job_of(tmp_path / "plain", "plain")
    for arguments, reason in [
        ([str(job), *out, "--format", "parquet"], "--format: no format 'parquet' (one of tokens, text, messages"),
        ([str(job), *out, "--verify", "axolotl"], "--verify: no check 'axolotl' (trl)"),
        ([str(job), *out, "--format", "alpaca", "--verify", "trl"], "TRL has no reader for alpaca rows"),
        ([str(plain), *out, "--format", "sharegpt"], "a template of plain text has no messages"),
    ]:
        done = invoke(*arguments)
        assert isinstance(done.exception, InputError)
        assert reason in str(done.exception)
    monkeypatch.setattr("kvopt.export.trl_check.find_spec", lambda name: None)
    done = invoke(str(job), *out, "--verify", "trl")
    assert isinstance(done.exception, InputError)
    assert 'TRL is not installed (pip install "trl>=1.16")' in str(done.exception)
    assert not (tmp_path / "r.jsonl").exists()


@pytest.mark.parametrize("select", ["gold_nll", "an-e"])
def test_mutations_are_taken_in_the_order_of_score_select(tmp_path: Path, select: str) -> None:
    def change(config: dict[str, Any]) -> None:
        selecting(select)(config)
        config["contexts"] = []

    path, out = write_job(tmp_path, change), tmp_path / "out"
    run_job(path, out)
    config, base_dir = load_config(path)
    with Run(config, base_dir, out, say=lambda line: None, bars=False).opened() as run:
        ranked = [(context.name, score.kl_forward.mean) for context, score in run.ranked_mutations()]
    names = list(dict.fromkeys(row["context_id"] for row in rows_of(path, out, "messages", "best-mutations:6")))
    assert names == [name for name, _ in ranked]
    assert [kl for _, kl in ranked] != sorted(kl for _, kl in ranked), "the order is not that of the KL"
    if select == "an-e":
        board = json.loads((out / "leaderboard.json").read_text("utf-8"))
        del board["mutations_in_order"], board["checksum"]
        (out / "leaderboard.json").write_text(json.dumps(board), "utf-8")
        with pytest.raises(InputError, match="the order of the mutations by an-e is not written down"):
            rows_of(path, out, "messages", "best-mutations:6")


def test_learned_contexts_of_a_student_are_exported_as_adapters(tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["contexts"] = config["contexts"][:1]
        config["mutations"] = {"count": 0}
        config["students"] = [
            {"name": "both", "contexts": ["original", "kv-8"], "steps": 1},
            {"name": "learned", "contexts": ["kv-8"], "steps": 1},
        ]

    path, file = write_job(tmp_path, change), tmp_path / "data" / "r.jsonl"
    arguments = [str(path), "--out", str(file), "--run", str(tmp_path / "out"), "--student"]
    done = invoke(*arguments, "both")
    assert isinstance(done.exception, InputError)
    assert "kv-8: is not learned yet" in str(done.exception)
    config, base_dir = load_config(path)
    with Run(config, base_dir, tmp_path / "out", say=lambda line: None, bars=False).opened() as run:
        run.learned(["kv-8"])
    done = invoke(*arguments, "both", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["contexts"] == {"original": len(inputs_of_run(tmp_path / "out").dataset.train)}
    assert report["adapters"] == [str(tmp_path / "data" / "kv-8-peft")]
    assert (tmp_path / "data/kv-8-peft/adapter_model.safetensors").is_file()
    assert "`kv-8-peft/`" in (tmp_path / "data/r.jsonl.md").read_text("utf-8")
    done = invoke(*arguments, "learned")
    assert isinstance(done.exception, InputError)
    assert "all contexts of the student are learned and have no rows" in str(done.exception)


def test_text_of_which_a_tokenizer_makes_other_ids_is_refused(tmp_path: Path) -> None:
    """A text after a BOS is another than one at the start; and TRL adds an EOS where we have none."""
    path = job_of(tmp_path, "llama2")
    with pytest.raises(InputError, match=r"original, .*other ids of this text.*use --format tokens"):
        rows_of(path, tmp_path, "text")
    endless = write_job(tmp_path / "b", lambda config: bare(config, template=PLAIN | {"end_token": False}))
    with pytest.raises(InputError, match=r"trainers put an EOS behind the output"):
        rows_of(endless, tmp_path, "text")
