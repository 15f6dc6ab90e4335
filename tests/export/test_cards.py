"""Export folders: cards whose snippets run, records, refusals, names of contexts, and the hub."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from kvopt.base.generate import answer_text, generate, stop_ids
from kvopt.config.document import load_config
from kvopt.config.model import BUILTIN_BASE
from kvopt.contexts import load_context
from kvopt.errors import InputError, KvoptError
from kvopt.export import upload
from kvopt.export.export_format import base_lines, export_formats
from kvopt.export.inspection import describe, describe_text
from kvopt.export.source import open_source
from kvopt.export.writing import export
from kvopt.run.run import Run
from kvopt.task.examples import Example
from kvopt.task.seam import Encoder
from kvopt.task.template import Template
from tests.export.readers import MLX_PYTHON, NO_MLX, module_of
from tests.jobs import run_job, write_job, write_rows
from tests.tiny import save_tiny, tiny_base, tiny_folder

CONTEXTS = {"kv": "#kv-8", "soft": "#soft-6", "text": "#m001"}
EXPORTED = [
    (name, kind) for name, one in export_formats().items() for kind in one.takes if (name, kind) != ("text", "soft")
]
"""Formats with what they hold; the run's soft prompt is trained, and no text (``test_readback.py`` has one that is)."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("job")
    run_job(write_job(folder), folder / "run")
    return folder / "run"


def exported(run: Path, to: str, kind: str, out: Path) -> Path:
    options = {"vllm": {"block_size": 2}}.get(to)
    export(f"{run}{CONTEXTS[kind]}", to, out, options=options)
    return out


def run_snippet(folder: Path, value: str = "") -> str:
    """Standard output of the card's Python, with ``value`` in the slot ``mr``, run from inside the folder by a fresh
    interpreter.
    """
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text("utf-8"), flags=re.S)
    code = code.replace("{{mr}}", value)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    python = sys.executable
    if (folder / "mlx.json").is_file():
        if MLX_PYTHON is None:
            pytest.skip(NO_MLX)
        python = MLX_PYTHON
    done = subprocess.run([python, "-c", code], cwd=folder, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode("utf-8")
    return done.stdout.decode("utf-8")


@pytest.mark.parametrize(("to", "kind"), EXPORTED)
def test_the_snippet_of_every_card_runs_and_answers_as_we_do(run: Path, to: str, kind: str, tmp_path: Path) -> None:
    folder = exported(run, to, kind, tmp_path / "out")
    said = run_snippet(folder)
    if kind == "text":
        assert said.strip()
        return
    base = tiny_base("llama")
    context = load_context(run / "contexts" / CONTEXTS[kind][1:], base)
    example = open_source(f"{run}{CONTEXTS[kind]}").prompt_example()
    assert example is not None
    assert "{{text}}" in example.text
    ids = base.tokenizer(example.text, add_special_tokens=False)["input_ids"][example.replaced :]
    if to == "vllm":
        request = json.loads(said)
        assert request["prompt"][context.tokens :] == ids
        return
    (answer,) = generate(base, context.prefix(base), [ids], max_new_tokens=64, stop=stop_ids(base))
    assert said.strip() == answer_text(base, answer).strip()


@pytest.mark.parametrize(("to", "kind"), EXPORTED)
def test_every_folder_says_what_it_is_for_which_base_and_how_good(
    run: Path, to: str, kind: str, tmp_path: Path
) -> None:
    folder = exported(run, to, kind, tmp_path / "out")
    card = (folder / "README.md").read_text("utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == str(tiny_folder("llama"))
    board = json.loads((run / "leaderboard.json").read_text())
    row = next((row for row in board["contexts"] if row["name"] == CONTEXTS[kind][1:]), None)
    if row:
        assert f"forward KL {row['kl_forward']['mean']:.4f}" in card
    facts = describe(folder)
    assert (facts["what"], facts["to"], facts["kind"]) == ("export", to, kind)
    text = describe_text(facts)
    assert facts["name"] in text
    assert str(tiny_folder("llama")) in text
    assert facts["snippet"].splitlines()[-1] in text


def test_a_learned_contexts_card_pins_base_template_and_data(run: Path, tmp_path: Path) -> None:
    card = (exported(run, "peft", "kv", tmp_path / "out") / "README.md").read_text()
    record = json.loads((run / "contexts" / "kv-8" / "kvopt.json").read_text())
    for digest in (record["base"]["weights"], record["template_sha256"], record["data_sha256"]):
        assert digest[:16] in card
    assert f"drop its first {record['template_tokens']} ids" in card
    assert record["replaced_ids"] == record["template_tokens"]


SEAM = "Sort the facts into one line.\nFacts: {{mr}}\nLine:\n"
VALUES = ("rain in the mountains", "the album, again", "book a table", "tomorrow")
"""The place before a value lies inside a token: ``Facts:`` is followed by one that begins with the space."""


@pytest.fixture(scope="module", params=["leading", "all"])
def seam_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose template has a space before its slot, on a base without a chat template."""
    folder = tmp_path_factory.mktemp("seam")

    def change(config: dict[str, Any]) -> None:
        config["model"]["base"] = str(tiny_folder("llama", "plain"))
        config["template"] = {"text": SEAM, "scope": request.param}
        config["data"]["limit"] = {"selection": 1}
        config["mutations"] = {"count": 0}
        config["contexts"] = [c | {"steps": 1} for c in config["contexts"] if c["name"] in ("kv-8", "soft-6")]

    config = write_job(folder, change)
    for name, values in (("train", [f"{value}!" for value in VALUES]), ("validation", VALUES)):
        write_rows(folder / f"{name}.jsonl", [{"mr": value, "output": "(a song)"} for value in values])
    run_job(config, folder / "run")
    return folder / "run"


@pytest.mark.parametrize(("to", "kind"), [(to, kind) for to, kind in EXPORTED if kind != "text"])
def test_every_snippet_cuts_a_prompt_where_its_ids_were_cut(seam_run: Path, to: str, kind: str, tmp_path: Path) -> None:
    spec = CONTEXTS[kind]
    folder = tmp_path / "out"
    export(f"{seam_run}{spec}", to, folder, options={"block_size": 2} if to == "vllm" else None)
    base = tiny_base("llama", "plain")
    context = load_context(seam_run / "contexts" / spec[1:], base)
    loaded, base_dir = load_config(seam_run.parent / "job.yaml")
    other = Run(loaded, base_dir, seam_run, say=lambda line: None, bars=False)
    other.use_base(base)
    rows = other.task().bare_rows("validation").rows
    value, row = VALUES[0], rows[0]
    text = value if loaded.template.scope == "all" else value + "\nLine:\n"
    assert base.tokenizer(text, add_special_tokens=False)["input_ids"] != list(row.body), "the seam is no seam"
    said = run_snippet(folder, value)
    if to == "vllm":
        assert json.loads(said)["prompt"][context.tokens :] == list(row.body)
        return
    (answer,) = generate(base, context.prefix(base), [row.body], max_new_tokens=64, stop=stop_ids(base))
    assert said.strip() == answer_text(base, answer).strip()


@pytest.mark.parametrize("answer_prefix", [None, "\n", " "])
def test_the_ids_behind_a_context_are_the_rows_own(answer_prefix: str | None, tmp_path: Path, run: Path) -> None:
    """Prompts of a chat template, with and without text between prompt and answer."""
    source = open_source(f"{run}#kv-8")
    assert source.run is not None
    source = replace(source, run=replace(source.run, answer_prefix=answer_prefix))
    example = source.prompt_example()
    assert example is not None
    tokenizer = AutoTokenizer.from_pretrained(source.base_name)
    encoder = Encoder(tokenizer, answer_prefix=answer_prefix)
    values = {"text": "Tell me about snow."}
    ids, _, _ = encoder.prompt_and_gold(source.run.template, Example("t", values, "weather", "t"))
    fed = tokenizer(example.text.replace("{{text}}", values["text"]), add_special_tokens=example.special)["input_ids"]
    assert fed == ids
    assert example.replaced == source.template_tokens


def test_a_peft_export_is_a_context_again(run: Path, tmp_path: Path) -> None:
    base = tiny_base("llama")
    for kind in ("kv", "soft"):
        folder = exported(run, "peft", kind, tmp_path / kind)
        before = load_context(run / "contexts" / CONTEXTS[kind][1:], base)
        assert load_context(folder, base).sha256() == before.sha256()


def test_the_original_and_mutations_are_exported_as_text(run: Path, tmp_path: Path) -> None:
    export(f"{run}#original", "text", tmp_path / "original")
    template = Template.from_json(json.loads((tmp_path / "original" / "template.json").read_text()))
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert template.to_json()["messages"] == config["template"]["messages"]
    messages = json.loads((tmp_path / "original" / "messages.json").read_text())
    assert messages == config["template"]["messages"]
    export(f"{run}#m001", "text", tmp_path / "m001")
    other = Template.from_json(json.loads((tmp_path / "m001" / "template.json").read_text()))
    assert other != template
    assert other.slot_sequence == template.slot_sequence


def test_a_template_file_is_in_the_run_directory_too(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Sort the message.\nMessage: {{text}}\nLabel:\n")
    config = write_job(tmp_path, lambda tree: tree.update(template={"file": "prompt.txt"}, contexts=[]))
    run_job(config, tmp_path / "run")
    export(f"{tmp_path / 'run'}#original", "text", tmp_path / "out")
    assert (tmp_path / "out" / "prompt.txt").read_text() == (tmp_path / "prompt.txt").read_text()


def test_a_mutation_scored_on_selection_rows_alone_says_so(run: Path, tmp_path: Path) -> None:
    board = json.loads((run / "leaderboard.json").read_text())
    (other, *_) = board["other_mutations"]
    source = open_source(f"{run}#{other['name']}")
    assert source.tokens == other["tokens"]
    assert source.metrics is not None
    assert source.metrics.split == "selection"
    export(f"{run}#{other['name']}", "text", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"On the selection rows: forward KL {other['selection']['kl_forward']['mean']:.4f}" in card


def test_a_damaged_leaderboard_is_named_for_a_context_of_its_run(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    for text in ("[]", "{", '{"contexts": [{"name": 3}]}'):
        (tmp_path / "run" / "leaderboard.json").write_text(text)
        with pytest.raises(InputError, match=r"leaderboard\.json"):
            export(f"{tmp_path / 'run'}#m001", "text", tmp_path / "out")
        export(tmp_path / "run/contexts/kv-8", "peft", tmp_path / "kv")


def test_another_base_than_the_contexts_is_refused_before_any_weights_are_read(run: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "moved", "llama", "chatml")
    export(f"{run}#kv-8", "hf-cache", tmp_path / "cache", base=str(tmp_path / "moved"))
    for other in (tiny_folder("qwen3"), tiny_folder("gemma3")):
        for spec in (f"{run}#kv-8", f"{run}#soft-6"):
            with pytest.raises(InputError, match=r"made for base .* differs? from"):
                export(spec, "peft", tmp_path / "out", base=str(other))
    assert not (tmp_path / "out").exists()


def test_the_same_context_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    for to in ("peft", "hf-cache", "mlx", "vllm"):
        first, again = (exported(run, to, "kv", tmp_path / f"{to}-{i}") for i in range(2))
        for path in (path.relative_to(first) for path in first.rglob("*") if path.is_file()):
            assert (first / path).read_bytes() == (again / path).read_bytes(), path


def test_the_built_in_base_is_found_by_name_in_snippets() -> None:
    assert "builtin_folder" in base_lines(BUILTIN_BASE)
    assert base_lines("org/model") == "base = 'org/model'"
    assert "locate" in base_lines("model.gguf")


def test_a_trl_data_set_holds_every_training_row_under_the_context(run: Path, tmp_path: Path) -> None:
    folder = exported(run, "trl-dataset", "text", tmp_path / "out")
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    template = open_source(f"{run}#m001").template
    assert template is not None
    values = [json.loads(line) for line in (run.parent / "train.jsonl").read_text().splitlines()]
    assert rows
    for row in rows:
        assert row["context_id"] == "m001"
        (value,) = [v for v in values if template.fill({"text": v["text"]}) == row["prompt"]]
        assert row["completion"] == [{"role": "assistant", "content": value["output"]}]


def test_data_that_are_not_found_are_asked_for(run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "far" / "away"
    shutil.copytree(run, moved)
    with pytest.raises(InputError, match="give the run's own config with --config"):
        export(f"{moved}#m001", "trl-dataset", tmp_path / "out")
    export(f"{moved}#m001", "trl-dataset", tmp_path / "out", options={"config": run.parent / "job.yaml"})


# ---- refusals


@pytest.mark.parametrize(
    ("to", "kind", "able"),
    [
        ("prompt-embeds", "kv", "peft, hf-cache, mlx, vllm"),
        ("text", "kv", "peft, hf-cache, mlx, vllm"),
        ("peft", "text", "text, trl-dataset"),
    ],
)
def test_a_kind_that_a_format_cannot_hold_is_refused_with_what_can(
    run: Path, to: str, kind: str, able: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"{to} cannot hold a {kind} context .use --to {able}"):
        export(f"{run}{CONTEXTS[kind]}", to, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_names_are_refused_with_the_right_ones(run: Path, tmp_path: Path) -> None:
    for spec, message in [
        (f"{run}#nope", "there are original, kv-8"),
        (str(run), "name one of its contexts"),
        (str(tmp_path / "nothing"), "no such context"),
        (f"{tmp_path}#kv-8", "is not a run directory"),
        (str(tmp_path), "is not a context folder"),
    ]:
        with pytest.raises(InputError, match=message):
            export(spec, "peft", tmp_path / "out")
    with pytest.raises(InputError, match="one of peft, prompt-embeds"):
        export(f"{run}#kv-8", "gguf", tmp_path / "out")
    with pytest.raises(InputError, match="it can be CARTRIDGE or PREFIX_TUNING"):
        export(f"{run}#kv-8", "peft", tmp_path / "out", options={"peft_type": "PROMPT_TUNING"})


def test_only_an_earlier_export_is_replaced(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is there already and is no export"):
        exported(run, "peft", "kv", out)
    assert (out / "notes.txt").read_text() == "mine"
    with pytest.raises(InputError, match="is the context itself"):
        exported(run, "peft", "kv", run / "contexts" / "kv-8")
    (out / "notes.txt").unlink()
    exported(run, "peft", "kv", out)
    exported(run, "hf-cache", "kv", out)
    assert not (out / "adapter_config.json").exists()


def test_damaged_contexts_are_not_exported(run: Path, tmp_path: Path) -> None:
    folder = exported(run, "peft", "kv", tmp_path / "c")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match="damaged or truncated"):
        export(folder, "hf-cache", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- the hub


class _Api:
    """Records what would be sent."""

    calls: ClassVar[list[tuple[str, dict[str, object]]]] = []
    fault: Exception | None = None

    def create_repo(self, repository: str, **options: object) -> str:
        if self.fault:
            raise self.fault
        self.calls.append(("create", {"repo_id": repository, **options}))
        return f"https://huggingface.co/{repository}"

    def upload_folder(self, **options: object) -> None:
        self.calls.append(("upload", options))


def test_the_whole_folder_is_pushed_and_private_unless_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(upload, "HfApi", _Api)
    _Api.calls, _Api.fault = [], None
    assert upload.push(tmp_path, "me/context", private=True) == "https://huggingface.co/me/context"
    (_, created), (_, uploaded) = _Api.calls
    assert created == {"repo_id": "me/context", "private": True, "exist_ok": True}
    assert uploaded["repo_id"] == "me/context"
    assert uploaded["folder_path"] == str(tmp_path)


def test_a_hub_that_cannot_be_reached_is_one_line_and_the_export_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(upload, "HfApi", _Api)
    monkeypatch.setattr(_Api, "fault", OSError("no route\nto host"))
    with pytest.raises(KvoptError, match="cannot be pushed: no route to host; the export stays in") as caught:
        upload.push(tmp_path, "me/context", private=True)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="give USER/NAME"):
        upload.push(tmp_path, "context", private=True)


def test_soft_prompts_keep_every_bit_on_their_way(run: Path, tmp_path: Path) -> None:
    """No cast between the folder and what a server is sent."""
    from safetensors.torch import load_file

    folder = exported(run, "prompt-embeds", "soft", tmp_path / "out")
    stored = load_file(run / "contexts" / "soft-6" / "adapter_model.safetensors")["prompt_embeddings"]
    assert torch.equal(load_file(folder / "soft_prompt.safetensors")["soft_prompt"], stored)
    script = module_of(folder / "prompt_embeds.py")
    rounded = torch.nn.Embedding(9, stored.shape[1]).bfloat16()
    request = script.request("m", script.whole_prompt(script.load_soft_prompt(folder), rounded, [3, 1]))
    sent = script.decode(request["prompt_embeds"])
    assert torch.equal(sent[:-2], stored), "a 16-bit base does not round the soft prompt"
    assert torch.equal(sent[-2:], rounded(torch.tensor([3, 1])).float())
