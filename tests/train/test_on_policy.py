"""On-policy distillation: the student's own answers, scored token by token by a teacher behind another context."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvopt.base.generate import generate, stop_ids
from kvopt.base.loading import Base, load_base
from kvopt.base.prefix import empty_prefix
from kvopt.config.document import load_config
from kvopt.config.model import ModelConfig
from kvopt.errors import InputError
from kvopt.kernels import Head
from kvopt.run.run import Run
from kvopt.task.seam import Row
from kvopt.train.commands import train_students
from kvopt.train.context_loss import Group
from kvopt.train.distill.drawn_answers import OnPolicyLoss, evaluating
from kvopt.train.distill.teacher import Teacher
from kvopt.train.gold_tokens import Gold
from kvopt.train.job import Job
from kvopt.train.losses.on_policy import OnPolicyDivergence
from kvopt.train.student import load_student, lora_student, read_student_record
from kvopt.train.trainer import StudentTrainer, train_student
from tests.jobs import write_job
from tests.tasks import Task, make_task
from tests.tiny import MODELS, save_tiny, tiny_base, tiny_folder, tiny_model
from tests.train.pools import job, pool, weights

LOSS = {"kind": "on-policy", "max_new_tokens": 6}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tiny_base("llama"), tmp_path_factory.mktemp("reference"))


def teacher_of(task: Task, name: str = "original", base: Base | None = None) -> Teacher:
    return Teacher(base or task.base, pool(task, name).contexts[0], stop_ids(task.base))


def on_policy_job(task: Task, folder: Path, *names: str, teacher: str = "original", **settings: Any) -> Job:
    loss = LOSS | settings.pop("loss", {})
    made = job(task, folder, pool(task, *names), **({"loss": loss} | settings))
    made.teacher = teacher_of(task, teacher)
    return made


def module_of(task: Task, *names: str, teacher: str = "original", size: float = 0.1, **loss: Any) -> OnPolicyLoss:
    """The loss of a student with random adapters."""
    student = lora_student(task.base, "s")
    for parameter in student.trainable().values():
        parameter.data.normal_(0, size)
    settings = OnPolicyDivergence(kind="on-policy", max_new_tokens=6, **loss)
    return OnPolicyLoss(student.base, task.base, pool(task, *names), settings, teacher_of(task, teacher), seed=1)


def divergence64(student: Tensor, teacher: Tensor, kind: str, beta: float) -> Tensor:
    """The formula on float64 logits [G, V]."""
    q, p = student.log_softmax(-1), teacher.log_softmax(-1)
    if kind == "reverse":
        return (q.exp() * (q - p)).sum(-1)
    m = (beta * p.exp() + (1 - beta) * q.exp()).log()
    return beta * (p.exp() * (p - m)).sum(-1) + (1 - beta) * (q.exp() * (q - m)).sum(-1)


@pytest.mark.parametrize(("kind", "beta"), [("reverse", 0.5), ("jsd", 0.5), ("jsd", 0.1)])
def test_value_and_gradient_equal_the_formula_in_float64_for_a_wider_teacher(kind: str, beta: float) -> None:
    hidden, wide = torch.randn(7, 8, requires_grad=True), torch.randn(7, 12)
    head, wide_head = Head(torch.randn(40, 8)), Head(torch.randn(40, 12))
    gold = Gold(hidden, torch.randint(40, (7,)), head, wide, wide_head)
    found = OnPolicyDivergence(kind="on-policy", divergence=kind, beta=beta)(gold)
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    exact = hidden.detach().double().requires_grad_(True)
    expected = divergence64(exact @ head.weight.double().T, wide.double() @ wide_head.weight.double().T, kind, beta)
    (wanted,) = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("divergence", ["reverse", "jsd"])
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(kind: str, divergence: str, tmp_path: Path) -> None:
    task = make_task(tiny_base(kind), tmp_path, count=4)
    module = module_of(task, "original", size=0.0, divergence=divergence)
    trained = [p for p in module.parameters() if p.requires_grad]
    loss = module([(row, 0) for row in range(4)])
    assert abs(float(loss.detach())) < 1e-6
    assert all(float(g.abs().max()) < 1e-5 for g in torch.autograd.grad(loss, trained, allow_unused=True))


@pytest.mark.parametrize("name", ["original", "other", "none", "kv", "soft"])
def test_the_loss_is_that_of_plain_models_on_the_students_own_answers(task: Task, name: str) -> None:
    module = module_of(task, name, temperature=0.0)
    item, model, base = module.pool.contexts[0], module.model, task.base
    rows = [0, 3, 5]
    bodies = [item.rows[row].body for row in rows]
    prefix = empty_prefix(base) if item.is_text else item.context.prefix(module.student)
    ends = frozenset(generate(module.student, prefix, bodies[:1], max_new_tokens=3)[0][2:])
    module.teacher = replace(module.teacher, ends=ends)
    loss = module([(row, 0) for row in rows])
    with torch.no_grad(), evaluating(model):
        answers = generate(module.student, prefix, bodies, max_new_tokens=6, stop=ends, keep_stop=True)
        assert answers[0][-1] in ends
        expected = 0.0
        for row, body, answer in zip(rows, bodies, answers, strict=True):
            seen = [*task.encoded.prefix, *task.encoded.rows[row].body, *answer]
            teacher = base.model(input_ids=torch.tensor([seen])).logits[0, -len(answer) - 1 : -1].double()
            student = _logits(module, item, Row("", body, answer)).double()
            expected += float(divergence64(student, teacher, "reverse", 0.5).mean())
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)


def test_answers_are_drawn_without_dropout(task: Task) -> None:
    student = lora_student(task.base, "s", dropout=0.9)
    for parameter in student.trainable().values():
        parameter.data.normal_(0, 0.5)
    loss = OnPolicyDivergence(kind="on-policy", temperature=0.0, max_new_tokens=6)
    module = OnPolicyLoss(student.base, task.base, pool(task, "original"), loss, teacher_of(task), seed=1).train()
    rows = module.pool.contexts[0].rows
    drawn = [row.gold for row in module._answers(None, rows, "0" * 10)]
    bodies = [row.body for row in rows]
    with evaluating(module):
        assert drawn == generate(module.student, empty_prefix(task.base), bodies, max_new_tokens=6, keep_stop=True)


def _logits(module: OnPolicyLoss, item: Any, row: Row) -> Tensor:
    """The student's logits on one answer, by its own forward pass of one row alone."""
    context = None if item.is_text else 0
    rows = [replace(row, example_id=module.pool.contexts[0].rows[0].example_id)]
    gold = module._gold(Group(context, rows, [(0, 0)], [0]))
    return gold.head.logits(gold.hidden)


def test_drawing_is_a_function_of_seed_and_place_in_the_stream(task: Task) -> None:
    module = module_of(task, "original")
    rows = module.pool.contexts[0].rows[:4]
    draws = [module._answers(None, rows, key) for key in ("00000000aa", "00000000aa", "00000000ab")]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
    items = [(row, 0) for row in range(4)]
    values = [float(module(items, position).detach()) for position in (0, 0, 4)]
    assert values[0] == values[1] != values[2]


def test_a_micro_batch_counts_each_row_once_whatever_the_length_of_its_answer(task: Task) -> None:
    module = module_of(task, "original", temperature=0.0)
    alone = [float(module([(row, 0)]).detach()) for row in range(4)]
    together = float(module([(row, 0) for row in range(4)]).detach())
    assert together == pytest.approx(sum(alone), rel=1e-4)


def test_tokens_are_counted_alike_however_rows_are_divided_into_micro_batches(task: Task) -> None:
    items = [(row, 0) for row in range(4)]
    counts = []
    for parts in ([items], [items[:2], items[2:]], [[item] for item in items]):
        module = module_of(task, "original", temperature=0.0)
        for part in parts:
            module(part)
        counts.append(module.counted)
    prompts = sum(len(module.pool.contexts[0].rows[row].body) for row, _ in items)
    assert counts == [counts[0]] * 3
    assert counts[0][0] == 2 * (prompts + counts[0][1] - len(items))


def test_the_loss_falls_and_gold_is_not_used(task: Task, tmp_path: Path) -> None:
    settings = {"steps": 30, "learning_rate": 0.02, "batch_size": 12, "loss": {"temperature": 0.5}}
    trained = train_student(on_policy_job(task, tmp_path / "a", "none", **settings))
    losses = [point["loss"] for point in trained.history]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    other = on_policy_job(task, tmp_path / "b", "none", **settings)
    item = other.pool.contexts[0]
    wrong = replace(item.encoded, rows=tuple(replace(row, gold=(9,)) for row in item.encoded.rows))
    other.pool = replace(other.pool, contexts=(replace(item, encoded=wrong),))
    other.__post_init__()
    assert train_student(other).history == trained.history


class Killed(Exception):
    pass


def test_a_killed_and_resumed_training_ends_in_the_same_bits(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"steps": 7, "learning_rate": 0.01, "checkpoint_every": 2, "lora": {"dropout": 0.2}, "accumulation": 2}
    names = ("original", "other", "kv")
    whole = train_student(on_policy_job(task, tmp_path / "whole", *names, **settings))
    once, died = StudentTrainer.compute_loss, []

    def fatal(self: StudentTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 5 and not died:
            died.append(5)
            raise Killed
        return once(self, *args, **kwargs)

    monkeypatch.setattr(StudentTrainer, "compute_loss", fatal)
    with pytest.raises(Killed):
        train_student(on_policy_job(task, tmp_path / "killed", *names, **settings))
    resumed = train_student(on_policy_job(task, tmp_path / "killed", *names, **settings))
    assert resumed.resumed == 4
    assert resumed.history == whole.history
    assert (resumed.tokens, resumed.gold_tokens) == (whole.tokens, whole.gold_tokens)
    assert 0 < whole.gold_tokens <= 7 * 4 * 6
    ours, theirs = weights(resumed.student), weights(whole.student)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_modules_are_in_train_mode_again_after_drawing(task: Task) -> None:
    module = module_of(task, "original")
    module.train()
    module.model.get_decoder().layers[0].eval()
    before = [m.training for m in module.modules()]
    module([(0, 0)])
    assert [m.training for m in module.modules()] == before


# through a config


def trained(run: Run) -> list[dict[str, Any]]:
    """The records of the run's students."""
    return [record.to_json() for record in train_students(run) or ()]


def run_of(folder: Path, student: dict[str, Any]) -> Run:
    """A run whose only student is ``student``."""
    chosen = {"name": "s", "contexts": ["random-mutations:2"], "steps": 2, "batch_size": 4, "report_to": []} | student
    config = write_job(folder, lambda c: c.update(students=[chosen]))
    return Run(*load_config(config), folder / "out", say=lambda line: None, bars=False)


def test_a_config_trains_against_the_base_behind_a_learned_context(tmp_path: Path) -> None:
    loss = {"kind": "on-policy", "max_new_tokens": 4, "divergence": "jsd", "teacher": {"context": "kv-8"}}
    run = run_of(tmp_path, {"loss": loss})
    [record] = trained(run)
    assert record["settings"]["loss"]["teacher"] == {"context": "kv-8", "base": None}
    assert (run.directory / "contexts" / "kv-8").is_dir()
    written = (run.directory / "students" / "s" / "adapter_model.safetensors").stat().st_mtime_ns
    trained(run)
    assert (run.directory / "students" / "s" / "adapter_model.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize(("vocabulary", "change"), [(400, {"hidden_size": 48}), (432, {})])
def test_a_larger_teacher_with_the_same_tokenizer_teaches(
    tmp_path: Path, vocabulary: int, change: dict[str, int]
) -> None:
    big = save_tiny(tmp_path / "big", "llama", "chatml")
    tiny_model("llama", vocabulary, **change).save_pretrained(big)
    loss = {"kind": "on-policy", "max_new_tokens": 4, "teacher": {"base": str(big)}}
    [record] = trained(run_of(tmp_path / "job", {"loss": loss}))
    assert record["history"][0]["loss"] > 0.01


def test_padding_of_the_vocabulary_is_neither_drawn_nor_compared(task: Task, tmp_path: Path) -> None:
    padded = save_tiny(tmp_path / "padded", "llama", "chatml")
    model = tiny_model("llama", 432)
    small = task.base.model.state_dict()
    with torch.no_grad():
        model.get_input_embeddings().weight[:400] = small["model.embed_tokens.weight"]
        model.load_state_dict({name: t for name, t in small.items() if t.shape[0] != 400}, strict=False)
    model.save_pretrained(padded)
    big = load_base(ModelConfig(base=str(padded), dtype="float32", device="cpu"))
    for student, teacher in ((task.base, big), (big, task.base)):
        own = lora_student(student, "s")
        context = pool(replace(task, base=student), "original")
        module = OnPolicyLoss(
            own.base, student, context, OnPolicyDivergence(kind="on-policy"), teacher_of(task, base=teacher), seed=1
        )
        assert module.student.head.size == 400
        assert abs(float(module([(0, 0), (1, 0)]).detach())) < 1e-5


def test_a_teacher_whose_weights_changed_makes_another_student(tmp_path: Path) -> None:
    big = save_tiny(tmp_path / "big", "llama", "chatml")
    loss = {"kind": "on-policy", "max_new_tokens": 4, "teacher": {"base": str(big)}}
    keys = [trained(run_of(tmp_path / "job", {"loss": loss}))[0]["key"] for _ in range(2)]
    model = tiny_model("llama", 400)
    model.get_input_embeddings().weight.data.mul_(1.5)
    model.save_pretrained(big)
    keys += [trained(run_of(tmp_path / "job", {"loss": loss}))[0]["key"]]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (
            {"base": str(tiny_folder("gemma3"))},
            r"teacher\.base: the teacher '.*gemma3.*' and the student's base '.*llama",
        ),
        ({"context": "nothing"}, r"teacher\.context: no context 'nothing'"),
        ({"context": "best-mutations:2"}, r"teacher\.context: a teacher sees one context"),
        ({"base": str(tiny_folder("llama")), "context": "kv-8"}, r"'kv-8' is learned for '.*' and not for"),
        ({"base": "./none"}, r"students\.s\.loss\.teacher\.base \./none: no such folder"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused_before_any_work(
    tmp_path: Path, teacher: dict[str, str], message: str
) -> None:
    run = run_of(tmp_path, {"loss": {"kind": "on-policy", "teacher": teacher}})
    with pytest.raises(InputError, match=message):
        trained(run)
    assert not (run.directory / "reference").exists()


def test_answers_that_do_not_fit_the_window_are_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path, {"loss": {"kind": "on-policy", "max_new_tokens": 5000}})
    with pytest.raises(InputError, match="5000 new ones do not fit"):
        trained(run)


# going on from another student


def test_a_student_goes_on_from_another(tmp_path: Path) -> None:
    first = run_of(tmp_path / "a", {"learning_rate": 0.01})
    [record] = trained(first)
    start = first.directory / "students" / "s"
    second = run_of(tmp_path / "b", {"start": str(start.resolve()), "learning_rate": 1e-12})
    [later] = trained(second)
    assert later["history"][0]["loss"] < record["history"][0]["loss"] - 0.01
    again = run_of(tmp_path / "c", {"start": str(start.resolve()), "learning_rate": 1e-12})
    assert trained(again)[0]["key"] == later["key"]
    assert trained(run_of(tmp_path / "d", {"learning_rate": 1e-12}))[0]["key"] != later["key"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": {"rank": 3}}, "has LoRA of another rank, alpha or targets"),
        ({"lora": {"alpha": 3}}, "has LoRA of another rank, alpha or targets"),
        ({"lora": {"targets": ["q_proj"]}}, "has LoRA of another rank, alpha or targets"),
        ({"method": "full"}, "is a lora student and cannot be trained further as a full one"),
        ({"start": "nowhere"}, "nowhere: is not a student folder"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    first = run_of(tmp_path / "a", {})
    trained(first)
    start = first.directory / "students" / "s"
    with pytest.raises(InputError, match=message):
        trained(run_of(tmp_path / "b", {"start": str(start.resolve())} | settings))


def test_a_full_student_goes_on_in_float32_where_the_other_stopped(tmp_path: Path) -> None:
    first = run_of(tmp_path / "a", {"method": "full", "learning_rate": 0.01})
    trained(first)
    folder = first.directory / "students" / "s"
    second = run_of(tmp_path / "b", {"method": "full", "start": str(folder.resolve()), "learning_rate": 1e-30})
    trained(second)
    base = load_base(ModelConfig(base=str(tiny_folder("llama")), dtype="float32", device="cpu"))
    one, two = load_student(folder, base), load_student(second.directory / "students" / "s", base)
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert read_student_record(folder) != read_student_record(second.directory / "students" / "s")


@pytest.mark.slow
def test_two_processes_give_the_loss_curve_of_one(tmp_path: Path) -> None:
    loss = {"kind": "on-policy", "max_new_tokens": 4, "temperature": 0.0, "teacher": {"context": "kv-8"}}
    common = {"contexts": ["original", "random-mutations:2"], "steps": 4, "batch_size": 4, "report_to": []}
    half = {"name": "half", "method": "full", "half": True, "contexts": ["original"], "epochs": 2}
    chosen = [common | {"name": "s", "loss": loss}, common | half | {"steps": None, "batch_size": 8}]
    config = write_job(tmp_path, lambda c: c.update(students=chosen))
    one = trained(Run(*load_config(config), tmp_path / "one", say=lambda line: None, bars=False))
    # A context learned by two processes has other last digits: the second run begins with the contexts of the first.
    shutil.copytree(tmp_path / "one", tmp_path / "two", ignore=shutil.ignore_patterns("students", ".training"))
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [sys.executable, *launch, "-m", "kvopt.cli", "train", str(config), "--out", str(tmp_path / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(
        [*command, "--json"], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for ours, theirs in zip(one, json.loads(done.stdout)["students"], strict=True):
        curve, other = ([point["loss"] for point in record["history"]] for record in (ours, theirs))
        assert other == pytest.approx(curve, abs=1e-5)
        for name in ("tokens", "gold_tokens", "key"):
            assert ours[name] == theirs[name]
