"""``kvopt lines`` and ``kvopt soup`` on student folders over a tiny base."""

from __future__ import annotations

import json
import re

import pytest
import torch

from kvopt.base.loading import load_base, stored_base
from kvopt.config.document import load_config
from kvopt.config.model import ModelConfig
from kvopt.run.run import Run
from kvopt.train.gold import gold_nll
from kvopt.train.merging.folders import best_soup
from kvopt.train.merging.lines import depth_scale
from kvopt.train.merging.lora_adapter import read_adapter
from kvopt.train.student import full_student, load_student, lora_student, read_student_record, save_student
from tests.jobs import write_job
from tests.tiny import tiny_folder


@pytest.fixture(scope="module")
def base():
    return load_base(ModelConfig(base=str(tiny_folder("llama")), dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def students(base, tmp_path_factory):
    """Three LoRA students (small, small, very large update) and two full ones, by name."""
    place = tmp_path_factory.mktemp("students")
    made = {}
    for name, size in (("a", 0.02), ("b", 0.02), ("wild", 3.0), ("full-a", 0.01), ("full-b", 0.01)):
        full = name.startswith("full")
        student = full_student(base, name) if full else lora_student(base, name, rank=2, targets=["q_proj", "v_proj"])
        torch.manual_seed(len(made))
        with torch.no_grad():
            for parameter in student.trainable().values():
                parameter += size * torch.randn_like(parameter)
        save_student(student, place / name, base)
        made[name] = place / name
    return made


def weights(folder, base):
    return dict(load_student(folder, base).model.named_parameters())


def test_lines_writes_a_student_whose_update_is_scaled_by_depth(kvopt, students, base, tmp_path):
    code, out, err = kvopt("lines", students["a"], "--alpha", 0.2, "--beta", 0.6, "--out", "scaled", "--json")
    assert code == 0, err
    assert json.loads(out)["alpha"] == 0.2
    before, after = read_adapter(students["a"]), read_adapter(tmp_path / "scaled")
    for name, factors in before.modules.items():
        expected = depth_scale(name, 3, 0.2, 0.6) * factors.product()
        torch.testing.assert_close(after.modules[name].product(), expected, rtol=1e-5, atol=1e-8)
    assert load_student(tmp_path / "scaled", base).name == "scaled"
    record = read_student_record(tmp_path / "scaled").to_json()
    assert record["made"]["of"][0]["name"] == "a"


def test_lines_on_a_full_student_scales_every_tensor_and_loads_again(kvopt, students, base, tmp_path):
    code, _, err = kvopt("lines", students["full-a"], "--alpha", 0, "--beta", 1, "--out", "scaled")
    assert code == 0, err
    trained, scaled = weights(students["full-a"], base), weights(tmp_path / "scaled", base)
    start = dict(base.model.named_parameters())
    assert torch.equal(scaled["model.embed_tokens.weight"], start["model.embed_tokens.weight"])
    assert torch.equal(scaled["model.norm.weight"], trained["model.norm.weight"])
    middle, name = 0.5, "model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(scaled[name], torch.lerp(start[name], trained[name], middle))


def test_a_soup_of_lora_students_answers_as_the_mean_of_the_updates(kvopt, students, base, tmp_path):
    code, out, err = kvopt("soup", students["a"], students["wild"], "--out", "mixed")
    assert code == 0, err
    assert "soup of a, wild, rank 4" in out
    parts = [read_adapter(students[name]).modules for name in ("a", "wild")]
    for name, factors in read_adapter(tmp_path / "mixed").modules.items():
        expected = sum(part[name].product() for part in parts) / 2
        torch.testing.assert_close(factors.product(), expected, rtol=1e-5, atol=1e-7)
    load_student(tmp_path / "mixed", base)


def test_a_soup_cut_to_a_rank_says_what_it_lost(kvopt, students, tmp_path):
    code, out, err = kvopt("soup", students["a"], students["b"], "--rank", 1, "--out", "mixed", "--json")
    assert code == 0, err
    made = json.loads(out)
    assert made["rank"] == 1
    assert 0 < made["lost"] < 1
    assert read_student_record(tmp_path / "mixed").to_json()["made"]["lost"] == made["lost"]


def test_a_soup_of_full_students_is_their_mean(kvopt, students, base, tmp_path, monkeypatch):
    monkeypatch.setattr("kvopt.base.loading._load_model", lambda *args: pytest.fail("a model was loaded"))
    code, _, err = kvopt("soup", students["full-a"], students["full-b"], "--out", "mixed")
    assert code == 0, err
    monkeypatch.undo()
    a, b, mixed = (weights(folder, base) for folder in (students["full-a"], students["full-b"], tmp_path / "mixed"))
    for name in mixed:
        torch.testing.assert_close(mixed[name], (a[name] + b[name]) / 2)


def test_a_greedy_soup_is_no_worse_than_its_best_student_on_the_selection_rows(kvopt, students, base, tmp_path):
    config = write_job(tmp_path / "job")
    chosen = [students[name] for name in ("wild", "a", "b")]
    code, out, err = kvopt("soup", *chosen, "--greedy", config, "--out", "mixed", "--json")
    assert code == 0, err
    made = json.loads(out)
    assert made["by"] == "greedy soup"
    alone = {tuple(t["members"]): t["value"] for t in made["tried"]}
    assert made["value"] <= min(alone[i,] for i in range(3)) < max(alone[i,] for i in range(3))
    run = Run(*load_config(config), tmp_path / "none", say=lambda line: None)
    value = gold_nll(
        load_student(tmp_path / "mixed", run.load_base()), run.task().original, run.task().rows("selection")
    ).mean
    assert made["value"] == pytest.approx(value, abs=1e-6)
    assert len(made["tried"]) == 5
    assert not (tmp_path / "none").exists()


def test_a_greedy_soup_takes_any_metric(students, base, tmp_path):
    chosen = [students["a"], students["b"]]
    stored = stored_base(ModelConfig(base=base.name))
    made = best_soup(chosen, stored, tmp_path / "mixed", lambda folder: 1.0, higher_is_better=True)
    assert [part.name for part in made.of] == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lines", "nowhere", "--out", "x"], r"nowhere: no such folder in .* \(give a folder from students/\)"),
        (["lines", ".", "--out", "x"], r"\.: does not say what its base is \(give --base\)"),
        (["lines", "{a}", "--out", "."], r"\.: already exists \(choose another --out\)"),
        (["lines", "{a}"], r"Missing option '--out'"),
        (["lines", "{a}", "--out", "x", "--base", "{other}"], r"a: trained from base .* differs"),
        (["soup", "{a}", "--out", "x"], r"a soup needs two or more students"),
        (["soup", "{a}", "{full-a}", "--out", "x"], r"is a LoRA student and .* a full one"),
        (["soup", "{full-a}", "{full-b}", "--rank", "2", "--out", "x"], r"--rank: full students have no rank"),
        (["soup", "{a}", "{b}", "--greedy", "no.yaml", "--out", "x"], r"no\.yaml: no such file"),
        (["soup", "{a}", "{b}", "--greedy", "{qwen}", "--out", "x"], r"its base differs from the students'"),
        (["soup", "{a}", "{b}", "--greedy", "{job}", "--context", "kv-8", "--out", "x"], r"kv-8: is not learned yet"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(kvopt, students, tmp_path, arguments, message):
    other = str(tiny_folder("qwen3", "chatml"))
    places = {
        **{name: str(folder) for name, folder in students.items()},
        "other": other,
        "job": str(write_job(tmp_path / "job")),
        "qwen": str(write_job(tmp_path / "qwen", lambda c: c["model"].update(base=other))),
    }
    code, out, err = kvopt(*(argument.format_map(places) for argument in arguments))
    assert code == 2
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    assert re.search(message, last), last
    assert not (tmp_path / "x").exists()
