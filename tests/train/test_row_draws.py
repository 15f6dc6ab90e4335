"""What is drawn for single rows in training: context dropout, and the other wording of the consistency loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import DynamicCache

from kvopt.config.document import load_config
from kvopt.config.students import StudentConfig
from kvopt.errors import InputError
from kvopt.run.inputs import read_inputs
from kvopt.train.context_loss import ContextLoss
from kvopt.train.losses.ce import CrossEntropy
from kvopt.train.losses.consistency import Consistency
from kvopt.train.pool import check_choices
from kvopt.train.row_draws import other_context, seen_slots
from kvopt.train.student import lora_student
from kvopt.train.trainer import train_student
from tests.jobs import write_job
from tests.tasks import Task, make_task
from tests.tiny import MODELS, tiny_base
from tests.train.pools import job, plain_logits, plain_nll, pool

SEED, DROPOUT = 5, 0.4


@pytest.fixture(scope="module", params=MODELS)
def task(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tiny_base(request.param), tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tiny_base("llama"), tmp_path_factory.mktemp("reference"))


def nll_without(model: Any, task: Task, item: Any, row: int, seen: Tensor) -> Tensor:
    """Σ −log p(gold) of one row by plain transformers, after a cache that holds only the slots seen; the row stands at
    the positions that it has after all of them.
    """
    states, line = item.context.prefix(task.base).stack(), item.encoded.rows[row]
    cache = DynamicCache()
    for layer in range(states.shape[1]):
        keys, values = (states[seen, layer, i].transpose(0, 1)[None] for i in (0, 1))
        cache.update(keys, values, layer)
    ids = torch.tensor([[*line.body, *line.gold]])
    places = torch.arange(len(states), len(states) + ids.shape[1])[None]
    logits = model(input_ids=ids, position_ids=places, past_key_values=cache).logits[0, -len(line.gold) - 1 : -1]
    return -logits.log_softmax(-1).gather(-1, torch.tensor(line.gold)[:, None]).sum()


def test_a_dropped_slot_gets_no_attention(llama: Task) -> None:
    student = lora_student(llama.base, "s", seed=0)
    contexts = pool(llama, "original", "kv", "soft")
    items = [(0, 1), (1, 0), (2, 1), (3, 2), (4, 1), (0, 2)]
    ours = ContextLoss(student.base, llama.base, contexts, CrossEntropy(), seed=SEED, dropout=DROPOUT)(items, 20)
    wanted, dropped = [], 0
    for place, (row, number) in enumerate(items):
        item = contexts.contexts[number]
        if item.is_text:
            wanted.append(plain_nll(student.base.model, llama, item, row))
            continue
        seen = seen_slots([20 + place], item.slots, DROPOUT, SEED)[0]
        dropped += int((~seen).sum())
        wanted.append(nll_without(student.base.model, llama, item, row, seen))
    assert dropped > 3
    torch.testing.assert_close(ours, torch.stack(wanted).sum(), rtol=1e-5, atol=1e-4)
    whole = ContextLoss(student.base, llama.base, contexts, CrossEntropy())(items, 20)
    assert abs(float((whole - ours).detach())) > 1e-2


def test_a_row_that_sees_no_slot_is_the_row_alone(llama: Task) -> None:
    student = lora_student(llama.base, "s", seed=0)
    contexts = pool(llama, "kv")
    ours = ContextLoss(student.base, llama.base, contexts, CrossEntropy(), seed=SEED, dropout=1 - 1e-9)([(0, 0)])
    wanted = nll_without(student.base.model, llama, contexts.contexts[0], 0, torch.zeros(5, dtype=torch.bool))
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-4)


def test_slots_are_dropped_with_that_probability_anew_for_each_row() -> None:
    seen = seen_slots(range(400), 50, 0.3, SEED)
    assert float(seen.float().mean()) == pytest.approx(0.7, abs=0.01)
    assert len({tuple(row.tolist()) for row in seen}) == 400
    assert torch.equal(seen_slots([7, 3], 50, 0.3, SEED), seen[[7, 3]])
    assert not torch.equal(seen_slots([7, 3], 50, 0.3, SEED + 1), seen[[7, 3]])


@pytest.mark.parametrize("settings", [{"context_dropout": 0.5}, {"loss": {"kind": "consistency", "weight": 2}}])
def test_micro_batches_draw_what_one_batch_draws(llama: Task, tmp_path: Path, settings: dict[str, Any]) -> None:
    curves = []
    for accumulation in (1, 4):
        of = job(
            llama,
            tmp_path / str(accumulation),
            pool(llama, "original", "other", "kv"),
            steps=3,
            accumulation=accumulation,
            **settings,
        )
        curves.append([point["loss"] for point in train_student(of).history])
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)


def test_dropout_is_in_stored_settings_only_where_there_is_some() -> None:
    plain = {"name": "s", "contexts": ["original"]}
    assert "context_dropout" not in StudentConfig.model_validate(plain).model_dump(mode="json")
    assert StudentConfig.model_validate(plain | {"context_dropout": 0.2}).model_dump()["context_dropout"] == 0.2


# ---- consistency


@pytest.mark.parametrize("divergence", ["jsd", "forward", "reverse"])
def test_consistency_is_the_divergence_from_the_student_under_another_wording(task: Task, divergence: str) -> None:
    student = lora_student(task.base, "s", seed=0)
    for name, parameter in student.model.named_parameters():
        if "lora_B" in name:  # or the student is the base
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    contexts = pool(task, "original", "other", "kv", weights=(1.0, 3.0, 1.0))
    items = [(0, 0), (1, 1), (2, 2), (3, 0), (0, 1), (1, 0)]
    loss = Consistency(kind="consistency", weight=0.7, divergence=divergence)
    module = ContextLoss(student.base, task.base, contexts, loss, seed=SEED)
    ours = module(items, 40)
    trained = [p for p in student.model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(ours, trained)

    wanted, others = torch.zeros((), dtype=torch.float64), []
    for place, (row, number) in enumerate(items):
        other = other_context(contexts.weights, number, 40 + place, SEED)
        others.append(other)
        assert other != number
        log_q = plain_logits(student.base.model, task, contexts.contexts[number], row).double().log_softmax(-1)
        with torch.no_grad():
            log_p = plain_logits(student.base.model, task, contexts.contexts[other], row).double().log_softmax(-1)
        gold = torch.tensor(contexts.contexts[number].encoded.rows[row].gold)
        if divergence == "jsd":
            m = ((log_p.exp() + log_q.exp()) / 2).log()
            apart = ((log_p.exp() * (log_p - m)).sum(-1) + (log_q.exp() * (log_q - m)).sum(-1)) / 2
        elif divergence == "forward":
            apart = (log_p.exp() * (log_p - log_q)).sum(-1)
        else:
            apart = (log_q.exp() * (log_q - log_p)).sum(-1)
        wanted = wanted + (0.7 * apart - log_q.gather(-1, gold[:, None])[:, 0]).sum()
    assert len(set(others)) > 1
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-4)
    for mine, theirs in zip(gradients, torch.autograd.grad(wanted, trained), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-4)


def test_the_tokens_of_the_other_wording_are_counted(llama: Task, tmp_path: Path) -> None:
    of = job(llama, tmp_path, pool(llama, "original", "other"), steps=2, loss={"kind": "consistency"})
    trained = train_student(of)
    items = [item for step in range(2) for item in of.plan.step_items(step, ())]
    both = sum(of.pool.tokens(row, 0) + of.pool.tokens(row, 1) for row, _ in items)
    assert trained.tokens == both
    assert trained.gold_tokens == sum(of.pool.gold_counts[row] for row, _ in items)


def test_another_context_is_drawn_by_its_weight() -> None:
    drawn = [other_context((1.0, 2.0, 6.0), 1, position, SEED) for position in range(700)]
    assert drawn.count(1) == 0
    assert drawn.count(2) / len(drawn) == pytest.approx(6 / 7, abs=0.04)


# ---- what is refused


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"contexts": ["original"], "loss": "consistency"}, "compares two wordings of a row, and the student has one"),
        ({"contexts": ["original", "none"], "context_dropout": 0.5}, "drops slots of soft and KV contexts"),
        ({"contexts": ["original", "best-mutations:1"], "loss": "consistency"}, None),
        ({"contexts": ["original", "kv-8"], "context_dropout": 0.5}, None),
    ],
)
def test_students_that_leave_nothing_to_draw_are_refused(
    tmp_path: Path, student: dict[str, Any], message: str | None
) -> None:
    config, base_dir = load_config(write_job(tmp_path, lambda c: c.update(students=[{"name": "s"} | student])))
    inputs = read_inputs(config, base_dir)
    if message is None:
        check_choices(inputs, config.students[0])
        return
    with pytest.raises(InputError, match=message):
        check_choices(inputs, config.students[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "consistency", "tokens": 100}, "two wordings of a row, which tokens does not count"),
        ({"loss": "on-policy", "context_dropout": 0.1}, "answers under whole contexts"),
        ({"context_dropout": 1.0}, "less than 1"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StudentConfig.model_validate({"name": "s", "contexts": ["original", "none"]} | settings)
