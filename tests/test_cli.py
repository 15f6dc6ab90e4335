"""The command line: JSON on stdout, one line for each fault, and nothing half-written."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from kvopt import cli
from tests.jobs import artefacts, entries, rows, run_job, write_job, write_rows
from tests.tiny import save_tiny, tiny_folder


@pytest.fixture
def fails(kvopt):
    """Run a command that must fail with one line; returns the line."""

    def run(*arguments, code=2):
        status, out, err = kvopt(*arguments)
        assert status == code, err
        assert out == ""
        lines = err.splitlines()
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:], err
        assert "Traceback" not in err
        return lines[-1]

    return run


@pytest.fixture
def job(tmp_path):
    """The config of a job of its own."""
    return write_job(tmp_path / "job")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    place = tmp_path_factory.mktemp("finished")
    config = write_job(place)
    run_job(config, place / "out")
    return config, place / "out"


def edit(config, change):
    document = yaml.safe_load(config.read_text("utf-8"))
    change(document)
    config.write_text(yaml.safe_dump(document), "utf-8")


# bad input: one clear line, exit code 2


@pytest.mark.parametrize("verb", ["validate", "run", "mutate", "score", "optimize"])
def test_a_missing_config_is_named(fails, tmp_path, verb):
    line = f"error: nope.yaml: no such file in {tmp_path} (kvopt init writes a starter config)"
    assert fails(verb, "nope.yaml") == line


@pytest.mark.parametrize("verb", ["validate", "run"])
class TestInput:
    def test_a_missing_data_file(self, fails, job, verb):
        (job.parent / "train.jsonl").unlink()
        line = f"error: train.jsonl: no such file in {job.parent} (paths are relative to the config file)"
        assert fails(verb, job) == line

    def test_a_broken_json_line(self, fails, job, verb):
        with (job.parent / "train.jsonl").open("a") as file:
            file.write('{"text": "Play", "output": \n')
        assert fails(verb, job).startswith("error: train.jsonl:15: broken JSON at column")

    def test_an_unknown_key(self, fails, job, verb):
        edit(job, lambda c: c["data"].update(outptu="x"))
        assert fails(verb, job) == f"error: {job}: unknown key 'data.outptu' (did you mean 'output'?)"

    def test_a_slot_without_a_column(self, fails, job, verb):
        edit(job, lambda c: c.update(template={"text": "{{text}} in {{language}}:"}))
        line = fails(verb, job)
        assert "train.jsonl:1" in line
        assert "'language' has no column" in line
        assert "data.columns" in line

    def test_a_column_named_twice(self, fails, job, verb):
        (job.parent / "train.csv").write_text("text,output,text\na,b,c\n")
        edit(job, lambda c: c["data"].update(train="train.csv"))
        assert fails(verb, job) == "error: train.csv:1: the column 'text' is named twice (rename one of them)"

    def test_an_empty_data_set(self, fails, job, verb):
        (job.parent / "validation.jsonl").write_text("\n")
        assert fails(verb, job) == "error: validation.jsonl: the data set is empty (it needs at least one row)"

    def test_a_template_without_slots(self, fails, job, verb):
        edit(job, lambda c: c.update(template={"text": "Sort the message."}))
        assert "no slot" in fails(verb, job)

    def test_a_row_longer_than_the_window(self, fails, job, verb):
        write_rows(job.parent / "train.jsonl", [*rows()[:13], {"text": "word " * 600, "output": "x"}])
        line = fails(verb, job)
        assert "train.jsonl:14" in line or "train:13" in line
        assert "512" in line

    def test_a_base_without_a_tokenizer(self, fails, job, verb, tmp_path):
        base = save_tiny(tmp_path / "base", "llama", "chatml")
        for file in base.iterdir():
            if "token" in file.name or file.suffix == ".jinja":
                file.unlink()
        assert "the base has no tokenizer" in fails(verb, job, "--set", f"model.base={base}")

    def test_a_base_that_is_not_there(self, fails, job, verb):
        assert fails(verb, job, "--set", "model.base=./nope").startswith("error: model.base ./nope: no such folder")

    def test_nothing_is_written(self, fails, job, verb, tmp_path):
        (job.parent / "train.jsonl").write_text("{")
        before = sorted(tmp_path.rglob("*"))
        fails(verb, job)
        assert sorted(tmp_path.rglob("*")) == before


def test_more_slots_than_the_window_holds(fails, job, tmp_path):
    line = fails("run", job, "--set", "contexts.kv-8.tokens=511", "--out", "out")
    assert line.startswith("error: contexts.kv-8.tokens: 511 slots and the longest row")
    assert artefacts(tmp_path / "out") == {}


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("nope", "--context: no context 'nope'"),
        ("job", "job: is not a context folder"),
        ("job/train.jsonl", "job/train.jsonl: is not a context folder"),
        ("kv-8", "kv-8: is not learned yet (kvopt run or kvopt optimize learns it)"),
        ("text:nope.txt", "nope.txt: no such file"),
        ("text:job", "job: cannot be read"),
        ("mutations:nope.jsonl", "nope.jsonl: no such file"),
        ("", "is not a context folder"),
    ],
)
def test_a_context_that_is_none_is_refused(fails, job, spec, line):
    assert line in fails("score", job, "--context", spec)


def test_a_context_of_another_base_is_refused(fails, finished, tmp_path):
    other = save_tiny(tmp_path / "other", "llama", "chatml", initializer_range=0.2)
    folder = finished[1] / "contexts" / "kv-8"
    line = fails("score", finished[0], "--context", folder, "--set", f"model.base={other}", "--out", "out")
    assert f"{folder}: made for base" in line
    assert "differs from" in line
    assert "in its weights" in line


def test_a_text_with_other_slots_is_refused(fails, job, tmp_path):
    (tmp_path / "other.txt").write_text("Sort {{message}}")
    assert "other.txt: has the slots message, the template has text" in fails(
        "score", job, "--context", "text:other.txt"
    )


def test_a_place_that_cannot_be_written_is_refused(fails, job, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert fails("run", job, "--out", "file").startswith("error: file: cannot be written: File exists")
    assert fails("run", job, "--out", "file/below").startswith("error: file/below: cannot be written: Not a directory")
    assert (tmp_path / "file").read_text() == "mine"
    assert "cannot be written" in fails("init", "file/below")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc")
def test_a_place_without_permission_is_refused(fails, job):
    line = fails("run", job, "--out", "/proc/kvopt-run")
    assert line.startswith("error: /proc/kvopt-run: ")
    assert line.endswith("(choose another folder)")


def test_a_folder_of_somebody_else_is_refused(fails, job):
    assert fails("run", job, "--out", job.parent) == (
        f"error: {job.parent}: contains other files and is not a run directory (choose an empty --out folder)"
    )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("after", [1, 4, 9, 20])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    fails, job, finished, tmp_path, monkeypatch, number, after
):
    out, fsync, calls = tmp_path / "out", os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > after:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        line = fails("run", job, "--out", out, code=1)
    assert "free space and run" in line
    assert not list(out.rglob("*.partial*"))
    run_job(job, out)
    assert artefacts(out) == artefacts(finished[1])


def test_ctrl_c_says_how_to_go_on(kvopt, job, monkeypatch):
    def interrupt(self, shown=None):
        raise KeyboardInterrupt

    monkeypatch.setattr("kvopt.run.run.Run.run", interrupt)
    code, out, err = kvopt("run", job)
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted; finished work is kept: run the same command again to go on"


def test_ctrl_c_that_native_code_turns_into_an_error_is_still_ctrl_c(kvopt, job, monkeypatch):
    def swallow(self, shown=None):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape of an object") from None

    monkeypatch.setattr("kvopt.run.run.Run.run", swallow)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code, _, err = kvopt("run", job)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130
    assert err.splitlines()[-1].startswith("interrupted; ")


def test_an_error_without_ctrl_c_is_not_hidden(kvopt, job, monkeypatch):
    def fail(self, shown=None):
        raise ValueError("a fault of ours")

    monkeypatch.setattr("kvopt.run.run.Run.run", fail)
    monkeypatch.setattr("sys.argv", ["kvopt", "run", str(job)])
    with pytest.raises(ValueError, match="a fault of ours"):
        cli.main()


# what comes out


def test_run_prints_one_json_document(kvopt, finished, tmp_path):
    shutil.copytree(finished[1], tmp_path / "out")
    code, out, err = kvopt("run", finished[0], "--out", "out", "--json")
    assert code == 0
    assert json.loads(out) == entries(finished[1] / "leaderboard.json")
    assert "base:" in err


def test_run_shows_a_table_that_is_not_cut_off(kvopt, finished, tmp_path):
    shutil.copytree(finished[1], tmp_path / "out")
    code, out, _ = kvopt("run", finished[0], "--out", "out")
    assert code == 0
    for name in ("original", "none", "kv-8", "kv-best", "soft-6", "100.0%", "run directory: out"):
        assert name in out


def test_score_has_the_promised_shape(kvopt, finished, tmp_path):
    (tmp_path / "short one é.txt").write_text("Name the label of the message.", "utf-8")
    folder = finished[1] / "contexts" / "kv-8"
    code, out, _ = kvopt(
        "score", finished[0], "--context", "none", "--context", "text:short one é.txt", "--context", folder, "--json"
    )
    assert code == 0
    contexts = json.loads(out)["contexts"]
    assert [(c["name"], c["kind"]) for c in contexts] == [("none", "text"), ("short one é", "text"), ("kv-8", "kv")]
    for context in contexts:
        assert {"tokens", "kl_forward", "gold_nll", "top1_agreement", "examples", "gold_tokens"} <= set(context)
        low, high = context["kl_forward"]["ci95"]
        assert low <= context["kl_forward"]["mean"] <= high
        assert context["kl_forward"]["p95"] >= 0
        assert context["examples"] == 6
    stored = {row["name"]: row for row in json.loads((finished[1] / "leaderboard.json").read_text())["contexts"]}
    assert contexts[2]["kl_forward"] == stored["kv-8"]["kl_forward"]


def test_score_takes_mutations_by_file_and_by_name(kvopt, finished, tmp_path):
    shutil.copytree(finished[1], tmp_path / "out")
    file = finished[1] / "mutations.jsonl"
    code, out, _ = kvopt("score", finished[0], "--out", "out", "--context", f"mutations:{file}", "--json")
    assert code == 0
    assert [c["name"] for c in json.loads(out)["contexts"]] == ["m001", "m002", "m003"]
    code, out, _ = kvopt("score", finished[0], "--out", "out", "--context", "m002", "--context", "soft-6", "--json")
    assert [c["name"] for c in json.loads(out)["contexts"]] == ["m002", "soft-6"]


def test_set_changes_the_config_of_a_run(kvopt, job):
    assert kvopt("mutate", job, "--set", "mutations.count=2", "--set", "name=other", "--json")[0] == 0
    assert len((job.parent.parent / "runs" / "other" / "mutations.jsonl").read_text().splitlines()) >= 2
    assert yaml.safe_load((job.parent.parent / "runs" / "other" / "config.yaml").read_text())["mutations"]["count"] == 2


def test_mutate_counts_by_reason(kvopt, job):
    code, out, _ = kvopt("mutate", job, "--json")
    document = json.loads(out)
    assert code == 0
    assert document["counts"]["accepted"] == 3 == len(document["accepted"])
    code, out, _ = kvopt("mutate", job)
    assert "3  accepted" in out


def test_optimize_only_learns_what_is_named(kvopt, fails, job, tmp_path):
    code, out, _ = kvopt("optimize", job, "--only", "soft-6", "--json", "--out", "out")
    assert code == 0
    (context,) = json.loads(out)["contexts"]
    assert (context["name"], context["kind"], context["tokens"]) == ("soft-6", "soft", 6)
    assert [p.name for p in (tmp_path / "out" / "contexts").iterdir()] == ["soft-6"]
    assert "no context 'nope' in the config" in fails("optimize", job, "--only", "nope")


def test_validate_says_what_there_is(kvopt, job, tmp_path):
    code, out, _ = kvopt("validate", job, "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["rows"] == {"train": 11, "selection": 3, "validation": 6}
    assert facts["slots"] == ["text"]
    assert not (tmp_path / "runs").exists()
    assert kvopt("validate", job)[0] == 0


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"init": "text:nope.txt"}, "nope.txt: no such file"),
        ({"init": "template", "tokens": 400}, "contexts.kv-8.tokens: 400 slots wanted, the text to start from has"),
        ({"init": "random-text", "tokens": 509}, "contexts.kv-8.tokens: 509 slots and the longest row"),
        ({"init": "context:nope"}, "contexts.kv-8: init 'context:nope': no such context or folder"),
    ],
)
def test_validate_checks_where_contexts_start(fails, job, change, line):
    edit(job, lambda document: document["contexts"][0].update(change))
    assert line in fails("validate", job)


def test_validate_wants_mutations_for_a_context_that_starts_from_one(fails, job):
    assert "kv-best: init 'best-mutation' needs mutations" in fails("validate", job, "--set", "mutations.count=0")


def test_validate_checks_the_contexts_of_students(fails, job, tmp_path):
    edit(job, lambda document: document.update(students=[{"name": "s", "contexts": ["original", "kv-9"]}]))
    assert "students.s.contexts: no context 'kv-9'" in fails("validate", job)
    assert not (tmp_path / "runs").exists()


def test_inspect_describes_a_context_without_its_base(kvopt, fails, finished, tmp_path):
    code, out, _ = kvopt("inspect", finished[1] / "contexts" / "soft-6", "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["kind"], facts["tokens"], facts["peft_type"]) == ("soft", 6, "PROMPT_TUNING")
    assert "PeftModel.from_pretrained" in kvopt("inspect", finished[1] / "contexts" / "kv-8")[1]
    assert "is not a context folder" in fails("inspect", tmp_path)
    broken = shutil.copytree(finished[1] / "contexts" / "kv-8", tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"123")
    assert "is damaged or truncated" in fails("inspect", broken)


def test_the_schema_is_printed(kvopt):
    code, out, _ = kvopt("config", "--schema")
    assert code == 0
    assert {"template", "data", "contexts"} <= set(json.loads(out)["properties"])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"templates": "nope.yaml"}, "nope.yaml: no such file (paths are relative to the config file)"),
        ({"probes": {"file": "nope.jsonl"}}, "nope.jsonl"),
        ({"metrics": [{"kind": "json-schema", "definition": "nope.json"}]}, "nope.json: no such file"),
    ],
)
def test_validate_reads_what_evaluation_will_need(fails, job, tmp_path, change, line):
    edit(job, lambda document: document.update(evaluate=change))
    assert line in fails("validate", job)
    assert not (tmp_path / "runs").exists()


def test_validate_checks_the_arms_of_a_study(fails, job):
    students = [{"name": "s", "contexts": ["original"], "steps": 1}]
    edit(job, lambda document: document.update(students=students, study={"seeds": [0], "reference": "t"}))
    assert "study.reference: no arm 't'" in fails("validate", job)


def test_init_writes_a_starter_that_validates_and_runs(kvopt, fails, tmp_path):
    assert kvopt("init", "new place")[0] == 0
    config = tmp_path / "new place" / "kvopt.yaml"
    assert {p.name for p in config.parent.iterdir()} == {"kvopt.yaml", "train.jsonl", "validation.jsonl"}
    base = ("--set", f"model.base={tiny_folder('llama')}")
    code, out, _ = kvopt("validate", config, *base, "--json")
    assert code == 0
    assert json.loads(out)["slots"] == ["message"]
    quick = ("--set", "contexts.kv-32.steps=2", "--set", "mutations.count=1", "--set", "model.dtype=float32")
    assert kvopt("run", config, *base, *quick, "--out", "out", "--json")[0] == 0
    assert "already exists" in fails("init", "new place")
    assert kvopt("init", "new place", "--force")[0] == 0


def test_init_infer_recovers_template_and_rows(kvopt, fails, tmp_path):
    prompts = [
        {"prompt": f"Sort the message.\nMessage: {row['text']}\nLabel:", "output": row["output"]} for row in rows()
    ]
    write_rows(tmp_path / "my prompts é.jsonl", prompts)
    code, _, err = kvopt("init", "got", "--infer", "my prompts é.jsonl")
    assert code == 0, err
    document = yaml.safe_load((tmp_path / "got" / "kvopt.yaml").read_text("utf-8"))
    assert "Message: " in document["template"]["text"]
    assert "{{message}}" in document["template"]["text"]
    code, out, err = kvopt("validate", "got/kvopt.yaml", "--set", f"model.base={tiny_folder('llama')}", "--json")
    assert code == 0, err
    assert sum(json.loads(out)["rows"].values()) == 20
    (tmp_path / "two.jsonl").write_text('{"prompt": "a"}\n')
    assert fails("init", "bad", "--infer", "two.jsonl").startswith("error: ")
    assert not (tmp_path / "bad").exists()
    assert "nope.txt: " in fails("init", "bad", "--infer", "nope.txt")


def test_wrong_usage_is_one_line_with_exit_code_2(kvopt, fails):
    assert "Did you mean 'run'" in fails("rnu")
    assert fails("run") == "error: kvopt run: Missing argument 'CONFIG.yaml' (kvopt run --help lists what it takes)"
    assert "--foo" in fails("run", "--foo")
    assert kvopt("--version")[:2] == (0, "kvopt 0.1.0\n")


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "kvopt", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Usage: kvopt " in done.stdout
