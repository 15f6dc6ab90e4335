"""Training: equal to a plain loop, exact sums over mixed contexts, resuming, and what must not change."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

from kvopt.base.loading import enable_checkpointing
from kvopt.base.prefix import prefill
from kvopt.errors import KvoptError
from kvopt.train import context_loss
from kvopt.train import trainer as module
from kvopt.train.context_loss import ContextLoss
from kvopt.train.gold import gold_nll
from kvopt.train.job import Job, Trained, make_plan
from kvopt.train.losses.anchored_kl import AnchoredKL
from kvopt.train.losses.ce import CrossEntropy
from kvopt.train.pool import Pool
from kvopt.train.student import full_student, lora_student
from kvopt.train.trainer import StudentTrainer, train_student
from tests.tasks import Task, make_task
from tests.tiny import MODELS, tiny_base, tiny_folder
from tests.train.pools import context, job, plain_logits, plain_nll, pool, weights

ALL = ("original", "other", "none", "kv", "soft")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tiny_base("llama"), tmp_path_factory.mktemp("reference"))


def losses(trained: Trained) -> list[float]:
    return [point["loss"] for point in trained.history]


def plain_losses(task: Task, of: Job) -> list[float]:
    """Supervised fine-tuning written out: PEFT, labels, the model's own loss, AdamW, a linear schedule."""
    config, rows = of.config, of.pool.contexts[0].rows
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"), dtype=torch.float32)
    torch.manual_seed(of.seed)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, round(config.warmup * of.plan.steps), of.plan.steps)
    curve = []
    for step in range(of.plan.steps):
        lines = [rows[row] for row, _ in of.plan.step_items(step, ())]
        width = max(len(line) for line in lines)
        ids, labels = torch.zeros(len(lines), width, dtype=torch.int64), torch.full((len(lines), width), -100)
        for i, line in enumerate(lines):
            ids[i, : len(line)] = torch.tensor([*line.body, *line.gold])
            labels[i, len(line.body) : len(line)] = torch.tensor(line.gold)
        mask = torch.arange(width)[None] < torch.tensor([[len(line)] for line in lines])
        loss = model(input_ids=ids, attention_mask=mask.long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        curve.append(float(loss.detach()))
    return curve


def test_on_the_original_alone_it_is_plain_supervised_fine_tuning(task: Task, tmp_path: Path) -> None:
    ours = job(task, tmp_path, pool(task, "original"), steps=16, learning_rate=0.01, warmup=0.25)
    trained = train_student(ours)
    curve = losses(trained)
    assert curve == pytest.approx(plain_losses(task, ours), abs=1e-5)
    assert curve[-1] < curve[0] - 1
    assert [point["learning_rate"] for point in trained.history[:5]] == pytest.approx([0, 0.0025, 0.005, 0.0075, 0.01])


@pytest.mark.slow
def test_on_the_original_alone_it_is_trl_s_supervised_fine_tuning(task: Task, tmp_path: Path) -> None:
    import trl
    from datasets import Dataset

    ours = job(task, tmp_path, pool(task, "original"), steps=9, learning_rate=0.01, warmup=0)
    items = [item for step in range(9) for item in ours.plan.step_items(step, ())]
    lines = [ours.pool.contexts[0].rows[row] for row, _ in items]
    rows = [
        {"input_ids": [*line.body, *line.gold], "completion_mask": [0] * len(line.body) + [1] * len(line.gold)}
        for line in lines
    ]
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"), dtype=torch.float32)
    torch.manual_seed(ours.seed)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    settings = trl.SFTConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=4,
        max_steps=9,
        learning_rate=0.01,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        completion_only_loss=True,
        seed=ours.seed,
    )
    theirs = trl.SFTTrainer(
        model=model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=task.base.tokenizer
    )
    theirs.train()
    curve = [log["loss"] for log in theirs.state.log_history if "loss" in log]
    assert losses(train_student(ours)) == pytest.approx(curve, abs=1e-5)


@pytest.mark.parametrize("settings", [{"accumulation": 2}, {"accumulation": 4}, {"gradient_checkpointing": True}])
def test_micro_batches_and_checkpointing_change_nothing(task: Task, tmp_path: Path, settings: dict[str, Any]) -> None:
    contexts = pool(task, *ALL)
    plain = train_student(job(task, tmp_path / "a", contexts, steps=6, learning_rate=0.01))
    other = train_student(job(task, tmp_path / "b", contexts, steps=6, learning_rate=0.01, **settings))
    assert losses(other) == pytest.approx(losses(plain), abs=1e-5)


def test_a_pool_s_identity_names_contexts_weights_and_rows(task: Task) -> None:
    whole = pool(task, *ALL)
    first, *rest = whole.contexts
    row = first.encoded.rows[2]

    def with_first(**changes: Any) -> Pool:
        return Pool((dataclasses.replace(first, **changes), *rest))

    def with_row(**changes: Any) -> Pool:
        rows = list(first.encoded.rows)
        rows[2] = dataclasses.replace(row, **changes)
        return with_first(encoded=dataclasses.replace(first.encoded, rows=tuple(rows)))

    others = [
        pool(task, *ALL[1:]),
        pool(task, *ALL[::-1]),
        with_first(weight=2.0),
        with_first(context=context(task, "other")),
        with_first(encoded=dataclasses.replace(first.encoded, rows=first.encoded.rows[:-1])),
        with_row(body=row.body[:-1]),
        with_row(gold=(row.gold[0] + 1, *row.gold[1:])),
        with_row(example_id="another"),
    ]
    assert len({one.sha256() for one in (whole, *others)}) == 1 + len(others)
    assert pool(task, *ALL).sha256() == whole.sha256()
    facts = [(one.name, one.kind, one.tokens, one.weight) for one in whole.facts()]
    assert [name for name, *_ in facts] == list(ALL)
    assert facts[3] == ("kv", "kv", 5, 1.0)
    assert whole.gold_counts == tuple(len(row.gold) for row in task.encoded.rows)
    assert whole.dropped == 0


@pytest.mark.parametrize("kind", MODELS)
def test_the_loss_of_mixed_contexts_is_the_sum_over_rows_run_alone(kind: str, tmp_path: Path) -> None:
    task = make_task(tiny_base(kind), tmp_path, count=5)
    contexts = pool(task, *ALL)
    student = lora_student(task.base, "s")
    for parameter in student.trainable().values():
        parameter.data.normal_(0, 0.1)
    items = [(row, number) for number in range(len(ALL)) for row in range(5)][::2]
    together = ContextLoss(student.base, task.base, contexts, CrossEntropy())(items)
    alone = sum(plain_nll(student.model, task, contexts.contexts[number], row) for row, number in items)
    assert float(together.detach()) == pytest.approx(float(alone.detach()), rel=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_the_loss_before_an_update_is_that_of_rows_run_alone_in_their_order(task: Task, name: str) -> None:
    item = pool(task, name).contexts[0]
    found = gold_nll(task.base, item.context, task.encoded, batch_size=3)
    alone = torch.stack([plain_nll(task.base.model, task, item, row) for row in range(len(item.rows))])
    torch.testing.assert_close(found.sums, alone.detach().double(), rtol=1e-4, atol=1e-4)
    assert found.counts.tolist() == [len(row.gold) for row in item.rows]


def test_gradients_of_mixed_contexts_are_those_of_rows_run_alone(task: Task) -> None:
    contexts = pool(task, *ALL)
    student = lora_student(task.base, "s")
    trained = list(student.trainable().values())
    for parameter in trained:
        parameter.data.normal_(0, 0.1)
    items = [(number, number) for number in range(len(ALL))]
    together = torch.autograd.grad(ContextLoss(student.base, task.base, contexts, CrossEntropy())(items), trained)
    alone = torch.autograd.grad(
        sum(plain_nll(student.model, task, contexts.contexts[number], row) for row, number in items), trained
    )
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_a_text_that_rows_share_is_run_once_and_the_gradients_are_those_of_rows_run_alone(
    kind: str, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(tiny_base(kind), tmp_path, count=5)
    contexts = pool(task, "original", "other")
    student = lora_student(task.base, "s")
    trained = list(student.trainable().values())
    for parameter in trained:
        parameter.data.normal_(0, 0.1)
    items = [(0, 0), (1, 1), (2, 0), (3, 0)]
    alone = torch.autograd.grad(
        sum(plain_nll(student.model, task, contexts.contexts[number], row) for row, number in items), trained
    )
    if checkpointing:
        enable_checkpointing(student.base.model)
    runs: list[int] = []
    monkeypatch.setattr(context_loss, "prefill", lambda base, ids: runs.append(len(ids)) or prefill(base, ids=ids))
    together = torch.autograd.grad(ContextLoss(student.base, task.base, contexts, CrossEntropy())(items), trained)
    assert runs == [len(contexts.contexts[0].encoded.prefix)]
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("anchor", ["original", "same"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_anchor_is_the_base_under_the_original_or_under_the_same_context(
    task: Task, method: str, anchor: Literal["original", "same"]
) -> None:
    contexts = pool(task, *ALL)
    student = lora_student(task.base, "s") if method == "lora" else full_student(task.base, "s")
    for parameter in student.trainable().values():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    loss = AnchoredKL(kind="anchored-kl", weight=0.5, direction="forward", anchor=anchor)
    for number, item in enumerate(contexts.contexts):
        with torch.no_grad():
            ours = ContextLoss(student.base, task.base, contexts, loss, task.reference)([(2, number)])
            seen = contexts.contexts[0] if anchor == "original" else item
            log_p = plain_logits(task.base.model, task, seen, 2).log_softmax(-1)
            log_q = plain_logits(student.model, task, item, 2).log_softmax(-1)
            nll = plain_nll(student.model, task, item, 2)
        kl = (log_p.exp() * (log_p - log_q)).sum()
        assert float(ours) == pytest.approx(float(nll + 0.5 * kl), rel=1e-4), item.name


@pytest.mark.parametrize("method", ["lora", "full"])
def test_only_the_student_changes(task: Task, tmp_path: Path, method: str) -> None:
    contexts = pool(task, *ALL)
    tensors = {item.name: getattr(item.context, "states", getattr(item.context, "embeddings", None))
               for item in contexts.contexts if item.name in ("kv", "soft")}  # fmt: skip
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    base = {name: p.detach().clone() for name, p in task.base.model.named_parameters()}
    ours = job(task, tmp_path, contexts, method=method, steps=4, learning_rate=0.01, loss="anchored-kl")
    start = weights(module.make_student(task.base, ours.config, ours.seed))
    trained = train_student(ours)
    assert all(not torch.equal(p, start[name]) for name, p in weights(trained.student).items())
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name])
        assert not tensor.requires_grad
        assert tensor.grad is None
    for name, parameter in task.base.model.named_parameters():
        assert torch.equal(parameter, base[name])
        assert parameter.grad is None


def test_equal_seeds_give_equal_bits_and_others_do_not(task: Task, tmp_path: Path) -> None:
    contexts = pool(task, "original", "kv")
    runs = [
        train_student(job(task, tmp_path / str(i), contexts, steps=4, seed=seed, lora={"dropout": 0.2}))
        for i, seed in enumerate((1, 1, 2))
    ]
    first, again, other = (weights(run.student) for run in runs)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


class Killed(Exception):
    pass


RESUMED = {
    "lora with dropout": ({"lora": {"dropout": 0.3}, "schedule": "resample"}, ALL),
    "full, half frozen": ({"method": "full", "half": True, "learning_rate": 0.001}, ("original", "kv")),
    "state-adaptive": ({"schedule": {"kind": "state-adaptive", "every": 3, "rows": 6}}, ALL),
    "sparse logs": ({"log_every": 2}, ("original", "soft")),
}


@pytest.mark.parametrize("variant", RESUMED)
def test_a_killed_and_resumed_training_ends_in_the_same_bits(
    task: Task, tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, names = RESUMED[variant]
    contexts = pool(task, *names)
    options = {"steps": 9, "learning_rate": 0.01, "checkpoint_every": 2} | settings
    whole = train_student(job(task, tmp_path / "whole", contexts, **options))
    once = StudentTrainer.compute_loss

    def fatal(self: StudentTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step in (3, 7) and self.state.global_step not in died:
            died.append(self.state.global_step)
            raise Killed
        return once(self, *args, **kwargs)

    died: list[int] = []
    monkeypatch.setattr(StudentTrainer, "compute_loss", fatal)
    for _ in range(2):
        with pytest.raises(Killed):
            train_student(job(task, tmp_path / "killed", contexts, **options))
        torch.manual_seed(99)
    resumed = train_student(job(task, tmp_path / "killed", contexts, **options))
    assert died == [3, 7]
    assert resumed.resumed == 6
    assert resumed.history == whole.history
    assert (resumed.stages, resumed.tokens) == (whole.stages, whole.tokens)
    ours, theirs = weights(resumed.student), weights(whole.student)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_half_written_checkpoint_and_one_of_another_job_are_not_taken_up(task: Task, tmp_path: Path) -> None:
    contexts = pool(task, "original")
    train_student(job(task, tmp_path, contexts, steps=4, checkpoint_every=1))
    (last,) = tmp_path.glob("checkpoint-*")
    assert module.last_checkpoint(tmp_path, "k") == last
    assert module.last_checkpoint(tmp_path, "other") is None
    (tmp_path / "checkpoint-9").mkdir()
    assert module.last_checkpoint(tmp_path, "k") == last
    (last / "complete.json").write_text('{"key"')
    assert module.last_checkpoint(tmp_path, "k") is None


@pytest.mark.parametrize("name", ["trained.safetensors", "optimizer.pt"])
@pytest.mark.parametrize("left", [0, 100])
def test_a_damaged_checkpoint_is_one_line_that_says_what_to_delete(
    task: Task, tmp_path: Path, name: str, left: int
) -> None:
    of = job(task, tmp_path, pool(task, "original"), steps=4, checkpoint_every=1)
    train_student(of)
    (last,) = tmp_path.glob("checkpoint-*")
    (last / name).write_bytes((last / name).read_bytes()[:left])
    with pytest.raises(KvoptError, match=r"checkpoint-3: the checkpoint is damaged: .*; delete it") as caught:
        train_student(of)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_diverging_training_stops_and_says_what_is_kept(
    task: Task, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = ContextLoss.forward

    def broken(self: ContextLoss, items: Any, position: int = 0) -> Any:
        total = once(self, items)
        if state["step"] == 3:
            return total * torch.inf if where == "loss" else total + _Poison.apply(total)
        state["step"] += 1
        return total

    state = {"step": 0}
    monkeypatch.setattr(ContextLoss, "forward", broken)
    ours = job(task, tmp_path, pool(task, "original"), steps=6, checkpoint_every=2)
    with pytest.raises(KvoptError, match=rf"students\.s: {where}.* at step 3; the state of step 2 is kept in"):
        train_student(ours)
    kept = module.last_checkpoint(tmp_path, "k")
    assert kept is not None
    assert json.loads((kept / "trainer_state.json").read_text())["global_step"] == 2


class _Poison(torch.autograd.Function):
    """0, with a gradient that is not a number."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(value)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> torch.Tensor:
        return upstream * torch.nan


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), "is the disk full"),
    ],
)
def test_a_checkpoint_that_cannot_be_written_is_one_line_and_the_last_one_stays(
    task: Task, tmp_path: Path, error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = torch.save

    def full(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-2" in str(file):
            raise error
        once(value, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(KvoptError, match=reason) as caught:
        train_student(job(task, tmp_path, pool(task, "original"), steps=4, checkpoint_every=1))
    assert "\n" not in str(caught.value)
    assert module.last_checkpoint(tmp_path, "k") == tmp_path / "checkpoint-1"


def test_a_learning_rate_out_of_this_world_diverges_with_a_message(task: Task, tmp_path: Path) -> None:
    ours = job(task, tmp_path, pool(task, "original"), steps=50, learning_rate=1e30, clip=1e30, method="full")
    with pytest.raises(KvoptError, match="lower learning_rate"):
        train_student(ours)


def test_mixed_precision_keeps_float32_masters_and_comes_close(task: Task, tmp_path: Path) -> None:
    contexts = pool(task, *ALL)
    for method in ("lora", "full"):
        settings = {"method": method, "steps": 4, "learning_rate": 0.001}
        exact = train_student(job(task, tmp_path / f"{method}-32", contexts, **settings))
        mixed = train_student(job(task, tmp_path / f"{method}-16", contexts, dtype="bfloat16", **settings))
        assert {p.dtype for p in weights(mixed.student).values()} == {torch.float32}
        assert losses(mixed) != losses(exact)
        assert losses(mixed) == pytest.approx(losses(exact), rel=0.03)


def test_a_student_of_a_16_bit_base_trains_on_every_kind_of_context(task: Task, tmp_path: Path) -> None:
    model = copy.deepcopy(task.base.model).to(torch.bfloat16)
    low = dataclasses.replace(task, base=dataclasses.replace(task.base, model=model, dtype=torch.bfloat16))
    contexts = pool(task, *ALL)
    for settings in ({}, {"method": "full"}, {"method": "full", "masters": "base"}, {"loss": "asft"}):
        of = job(low, tmp_path / str(settings), contexts, steps=3, **settings)
        trained = train_student(dataclasses.replace(of, reference=None))
        masters = torch.bfloat16 if "masters" in settings else torch.float32
        assert {p.dtype for p in weights(trained.student).values()} == {masters}
        assert all(torch.isfinite(p).all() for p in weights(trained.student).values())


def test_budgets_in_steps_epochs_and_tokens(task: Task, tmp_path: Path) -> None:
    contexts = pool(task, "original", "kv")
    rows = contexts.rows

    def plan(**budget: Any) -> Any:
        return make_plan(job(task, tmp_path, contexts, **budget).config, contexts, 3)

    assert plan(steps=7).steps == 7
    assert plan().steps == rows * 2 // 4
    assert plan(epochs=1.5).steps == rows * 3 // 4
    assert plan(epochs=1.01).steps == rows * 2 // 4 + 1
    by_tokens = plan(tokens=500)
    seen = [sum(contexts.tokens(*item) for item in by_tokens.step_items(step, ())) for step in range(by_tokens.steps)]
    assert sum(seen[:-1]) < 500 <= sum(seen)


def test_steps_tokens_and_gold_tokens_are_counted(task: Task, tmp_path: Path) -> None:
    contexts = pool(task, "original", "kv")
    trained = train_student(job(task, tmp_path, contexts, epochs=1))
    rows = task.encoded.rows
    assert trained.steps == 6
    assert trained.gold_tokens == 2 * sum(len(row.gold) for row in rows)
    assert trained.tokens == sum(len(task.encoded.prefix) + 2 * (len(row) - 1) for row in rows)
    assert context(task, "kv").tokens == 5
