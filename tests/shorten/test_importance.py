"""What each token of a text is worth: a gate near 0 is the token's absence, and the estimates are what they say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from kvopt.base import attention
from kvopt.base.attention import allowed_keys, gated, watched
from kvopt.base.loading import Base
from kvopt.base.prefix import prefill, prefill_after, run_bodies
from kvopt.measure.score import score_prefix
from kvopt.shorten import importance
from kvopt.shorten.importance import GONE, largest_attention, sensitivity
from kvopt.task.seam import make_batch
from tests.naive import naive_attention_weights
from tests.tasks import Task, make_task


@pytest.fixture(params=["llama", "qwen3", "gemma3"])
def task(request: pytest.FixtureRequest, tmp_path: Path) -> Task:
    return make_task(request.getfixturevalue(request.param), tmp_path, 6)


def test_a_prefix_in_two_parts_is_the_prefix_in_one(task: Task) -> None:
    ids = torch.tensor(task.encoded.prefix)
    with torch.no_grad():
        whole = prefill(task.base, ids=ids)
        for cut in (0, 1, 5, len(ids)):
            joined = prefill_after(task.base, whole.first(cut), ids[cut:])
            for one, other in zip((*whole.keys, *whole.values), (*joined.keys, *joined.values), strict=True):
                torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])  # a sliding window still counts the tokens that are gone
def test_a_token_whose_gate_is_nearly_shut_is_as_good_as_not_there(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    task = make_task(request.getfixturevalue(kind), tmp_path, 6)
    base, rows = task.base, task.encoded.rows
    ids = list(task.encoded.prefix)
    kept = torch.ones(len(ids), dtype=torch.bool)
    kept[[2, 5, 6, 9]] = False
    batch = make_batch(rows, range(len(rows)))
    with torch.no_grad():
        short = prefill(base, ids=torch.tensor(ids)[kept])
        expected = run_bodies(base, short, batch)[batch.predicts[:, 0], batch.predicts[:, 1]]
        with gated(base, torch.where(kept, 1.0, GONE)):
            hidden = importance._gold_hidden(base, torch.tensor(ids), kept, batch)
        with gated(base, torch.ones(len(ids))):
            open_ = importance._gold_hidden(base, torch.tensor(ids), kept, batch)
    assert (hidden - expected).norm() < 0.02 * (open_ - expected).norm()


def test_gain_is_the_slope_of_the_kl_and_fisher_that_of_the_distribution(task: Task) -> None:
    """Both against float64 formulas, by finite differences of the gates."""
    base, rows = task.base, list(task.encoded.rows[:2])
    ids = list(task.encoded.prefix)
    kept = torch.ones(len(ids), dtype=torch.bool)
    kept[[3, 4]] = False
    places = [1, 3, 7]

    def log_q(gates: Tensor) -> Tensor:
        states = []
        for row in rows:  # one batch each: no padding
            batch = make_batch([row], [0])
            with torch.no_grad(), gated(base, gates):
                states.append(importance._gold_hidden(base, torch.tensor(ids), kept, batch))
        return base.head.logits(torch.cat(states)).double().log_softmax(-1)

    gates = torch.where(kept, 1.0, GONE)
    p = base.head.logits(task.reference.hidden([row.example_id for row in rows])).double().softmax(-1)
    q = log_q(gates)
    found = sensitivity(base, ids, kept, rows, task.reference, probes=400)
    for place in places:
        step = 0.02 if kept[place] else GONE / 4
        up, down = gates.clone(), gates.clone()
        up[place] += step
        down[place] -= step
        slope = (log_q(up) - log_q(down)) / (2 * step)  # [G, V]
        gain = float(-(p * slope).sum(-1).mean())
        fisher = float(0.5 * (q.exp() * slope.square()).sum(-1).mean())
        assert float(found.gain[place]) == pytest.approx(gain, rel=0.05, abs=2e-5)
        assert float(found.fisher[place]) == pytest.approx(fisher, rel=0.35)


def test_gates_have_the_same_gradient_where_attention_is_computed_again(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.tensor(task.encoded.prefix)
    batch = make_batch(task.encoded.rows, [0, 1])
    again: list[int] = []

    def counting(function: Any, *given: Any, **how: Any) -> Any:
        again.append(1)
        return checkpoint(function, *given, **how)

    def gradient() -> tuple[Tensor, Tensor]:
        gates = torch.linspace(0.3, 1.0, len(ids)).requires_grad_()
        with gated(task.base, gates):
            hidden = importance._gold_hidden(task.base, ids, torch.ones(len(ids), dtype=torch.bool), batch)
            (hidden * torch.arange(len(hidden))[:, None]).mean().backward()
        assert gates.grad is not None
        return hidden.detach(), gates.grad

    monkeypatch.setattr(attention, "checkpoint", counting)
    kept = gradient()
    assert not again
    monkeypatch.setattr(attention, "KEPT_QUERIES", 0)
    computed = gradient()
    assert again
    assert kept[1].abs().max() > 1e-4
    for one, other in zip(computed, kept, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masks_of_booleans_and_of_addends_allow_the_same_keys(dtype: torch.dtype) -> None:
    addends = torch.tensor([0.0, torch.finfo(dtype).min, -1.0, -math.inf], dtype=dtype)
    assert allowed_keys(addends).tolist() == [True, False, True, False]
    allowed = torch.tensor([True, False])
    assert allowed_keys(allowed) is allowed


def test_a_base_is_as_it_was_after_its_attention_was_watched(task: Task) -> None:
    before = task.base.model.config._attn_implementation
    seen: list[tuple[int, ...]] = []

    def observe(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None) -> None:
        seen.append((query.shape[-2], key.shape[-2], value.shape[-2]))

    ids = torch.tensor(task.encoded.prefix)
    with torch.no_grad():
        expected = prefill(task.base, ids=ids).stack()
        with watched(task.base, observe):
            found = prefill(task.base, ids=ids).stack()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert seen == [(len(ids),) * 3] * task.base.geometry.layers
    assert task.base.model.config._attn_implementation == before
    for interface in (AttentionInterface, AttentionMaskInterface):
        assert attention._OURS not in interface._global_mapping


def test_the_largest_attention_is_that_of_an_eager_model(llama: Base, tmp_path: Path) -> None:
    task = make_task(llama, tmp_path, 5)
    found = largest_attention(llama, task.encoded.prefix, task.encoded.rows)
    expected = torch.zeros(len(task.encoded.prefix))
    for row in task.encoded.rows:
        tokens = [*task.encoded.prefix, *row.body, *row.gold][:-1]
        weights = naive_attention_weights(llama, tokens)  # [L, H, n, n]
        body = weights[:, :, len(task.encoded.prefix) :, : len(task.encoded.prefix)]
        expected = torch.maximum(expected, body.amax((0, 1, 2)))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_row_with_many_gold_tokens_is_sampled(llama: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(llama, tmp_path, 4)
    monkeypatch.setattr(importance, "GOLD_PER_BATCH", 6)
    kept = torch.ones(len(task.encoded.prefix), dtype=torch.bool)
    few = sensitivity(llama, task.encoded.prefix, kept, task.encoded.rows, task.reference, probes=300)
    monkeypatch.setattr(importance, "GOLD_PER_BATCH", 512)
    many = sensitivity(llama, task.encoded.prefix, kept, task.encoded.rows, task.reference, probes=300)
    assert torch.corrcoef(torch.stack([few.fisher, many.fisher]))[0, 1] > 0.8
    torch.testing.assert_close(few.gain, many.gain, atol=1e-6, rtol=1e-3)


def test_long_texts_give_the_same_without_keeping_the_weights(
    llama: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(llama, tmp_path, 4)
    kept = torch.ones(len(task.encoded.prefix), dtype=torch.bool)
    kept[3] = False
    whole = sensitivity(llama, task.encoded.prefix, kept, task.encoded.rows, task.reference)
    monkeypatch.setattr("kvopt.base.attention.KEPT_QUERIES", 4)
    again = sensitivity(llama, task.encoded.prefix, kept, task.encoded.rows, task.reference)
    torch.testing.assert_close(whole.fisher, again.fisher)
    torch.testing.assert_close(whole.gain, again.gain)


def test_scores_after_a_gated_run_are_unchanged(llama: Base, tmp_path: Path) -> None:
    """The base has its own attention back."""
    task = make_task(llama, tmp_path, 4)
    before = score_prefix(llama, task.original.prefix(llama), task.encoded.rows, task.reference).kl
    kept = torch.ones(len(task.encoded.prefix), dtype=torch.bool)
    sensitivity(llama, task.encoded.prefix, kept, task.encoded.rows, task.reference)
    assert torch.equal(before, score_prefix(llama, task.original.prefix(llama), task.encoded.rows, task.reference).kl)
