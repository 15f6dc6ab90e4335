"""Attention matching: the slots chosen and the values fitted, against formulas written out, query by query in float64.

What each layer's attention is given is taken from two plain runs of every row by itself: after the long prefix, and
after the short one that came out.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvopt.base.attention import allowed_keys, watched
from kvopt.base.loading import Base
from kvopt.base.prefix import Prefix, prefill, run_bodies
from kvopt.contexts import compaction
from kvopt.contexts.compaction import fewer_slots
from kvopt.task.seam import make_batch
from tests.tasks import Task, make_task
from tests.tiny import MODELS, tiny_base

SLOTS, RIDGE = 7, 0.01


@pytest.fixture(scope="module", params=MODELS)
def task(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tiny_base(request.param), tmp_path_factory.mktemp(request.param))


@torch.no_grad()
def long_prefix(task: Task) -> Prefix:
    return prefill(task.base, ids=torch.tensor(task.encoded.prefix))


@torch.no_grad()
def queries(task: Task, prefix: Prefix) -> list[list[list[tuple[Tensor, Tensor, Tensor]]]]:
    """For each layer and key/value head, each query of any row: its logits [m] (−inf where it may not look), the values
    [m, d] behind them, and what it reads [d], all in float64, when the row runs alone after ``prefix``.
    """
    found: list[list[list[tuple[Tensor, Tensor, Tensor]]]] = [
        [[] for _ in range(task.base.geometry.kv_heads)] for _ in range(task.base.geometry.layers)
    ]

    def observe(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> None:
        groups = query.shape[1] // key.shape[1]
        for head in range(query.shape[1]):
            keys, values = key[0, head // groups].double(), value[0, head // groups].double()
            for place in range(query.shape[2]):
                factor = scaling if scaling is not None else query.shape[-1] ** -0.5
                logits = keys @ query[0, head, place].double() * factor
                logits[~allowed_keys(mask)[0, 0, place]] = -torch.inf
                found[module.layer_idx][head // groups].append((logits, values, logits.softmax(0) @ values))

    with watched(task.base, observe):
        for place in range(len(task.encoded.rows)):
            run_bodies(task.base, prefix, make_batch(task.encoded.rows, [place]))
    return found


def ridge_values(after: Any, wanted: Any, old: Tensor, ridge: float) -> Tensor:
    """The values [T, d] with the least squared error of what is read plus a penalty on leaving ``old``, as a plain
    least-squares problem.
    """
    slots = len(old)
    weights, rest = [], []
    for (logits, values, _), (_, _, target) in zip(after, wanted, strict=True):
        weight = logits.softmax(0)
        weights.append(weight[:slots])
        rest.append(target - weight[slots:] @ values[slots:] - weight[:slots] @ old)
    table, right = torch.stack(weights), torch.stack(rest)
    damping = ridge * table.square().sum(0).mean() + 1e-6
    table = torch.cat([table, damping.sqrt() * torch.eye(slots, dtype=torch.float64)])
    right = torch.cat([right, torch.zeros(slots, old.shape[1], dtype=torch.float64)])
    return old + torch.linalg.lstsq(table, right).solution


def slots_that_stay(task: Task, before: Any, values: Tensor) -> list[int]:
    """Slot 0 and those with the largest Σ w² ‖v − mean v‖² over the queries, in their order."""
    apart = (values - values.mean(0)).square().sum(-1)
    score = torch.zeros(len(values), dtype=torch.float64)
    for logits, _, _ in before:
        score += logits.softmax(0)[: len(values)].square() * apart
    score[0] = torch.inf
    return sorted(score.topk(SLOTS).indices.tolist())


def test_keys_of_the_first_layer_are_those_whose_loss_would_change_what_is_read(task: Task) -> None:
    long = long_prefix(task)
    short = fewer_slots(task.base, long, SLOTS, task.encoded.rows, ridge=RIDGE)
    before = queries(task, long)
    for head in range(task.base.geometry.kv_heads):
        keep = slots_that_stay(task, before[0][head], long.values[0][head].double())
        turned = task.base.rope.rotate(long.keys[0][head, keep], SLOTS - len(long), 0)
        torch.testing.assert_close(short[:, 0, 0, head], turned)


def test_values_of_every_layer_are_the_ridge_fit_to_what_the_layers_below_really_give(task: Task) -> None:
    long = long_prefix(task)
    short = fewer_slots(task.base, long, SLOTS, task.encoded.rows, ridge=RIDGE)
    kept = fewer_slots(task.base, long, SLOTS, task.encoded.rows, ridge=1e9)  # the chosen slots' own values
    before, after = queries(task, long), queries(task, Prefix.unstack(short, torch.float32))
    assert (short[:, 0, 1] - kept[:, 0, 1]).abs().max() > 1e-3
    for layer in range(task.base.geometry.layers):
        for head in range(task.base.geometry.kv_heads):
            own = own_values(task.base, short[:, layer, 0, head], long, layer, head)
            fitted = ridge_values(after[layer][head], before[layer][head], own, RIDGE)
            torch.testing.assert_close(short[:, layer, 1, head].double(), fitted, rtol=1e-3, atol=1e-4)


def own_values(base: Base, keys: Tensor, long: Prefix, layer: int, head: int) -> Tensor:
    """The long prefix's values [T, d] at the slots whose keys [T, d] are these."""
    old = base.rope.rotate(keys, len(long) - len(keys), layer)
    places = torch.cdist(old.double(), long.keys[layer][head].double()).argmin(-1)
    torch.testing.assert_close(old, long.keys[layer][head, places], rtol=1e-4, atol=1e-4)
    return long.values[layer][head, places].double()


def test_few_queries_at_once_and_padded_rows_give_the_same_slots(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    long = long_prefix(task)
    whole = fewer_slots(task.base, long, SLOTS, task.encoded.rows)
    monkeypatch.setattr(compaction, "QUERIES_AT_ONCE", 5)
    monkeypatch.setattr(compaction, "LINES_AT_ONCE", 1)
    padded = replace(task.base, capability=replace(task.base.capability, packs=False))
    torch.testing.assert_close(fewer_slots(padded, long, SLOTS, task.encoded.rows), whole, rtol=1e-3, atol=1e-4)


def test_slots_with_the_largest_importance_given_stay_with_their_own_values_unless_refitted(task: Task) -> None:
    long, g = long_prefix(task), task.base.geometry
    importance = torch.rand(g.layers, g.kv_heads, len(long), generator=torch.Generator().manual_seed(0))
    short = fewer_slots(task.base, long, SLOTS, task.encoded.rows, refit=False, importance=importance)
    refitted = fewer_slots(task.base, long, SLOTS, task.encoded.rows, importance=importance)
    torch.testing.assert_close(refitted[:, :, 0], short[:, :, 0])
    assert not torch.allclose(refitted[:, :, 1], short[:, :, 1])
    for layer in range(g.layers):
        for head in range(g.kv_heads):
            others = importance[layer, head, 1:].topk(SLOTS - 1).indices + 1
            keep = [0, *sorted(others.tolist())]
            torch.testing.assert_close(short[:, layer, 1, head], long.values[layer][head, keep])


def test_a_share_of_the_queries_is_drawn_with_the_seed(task: Task) -> None:
    long = long_prefix(task)

    def drawn(seed: int) -> Tensor:
        return fewer_slots(task.base, long, SLOTS, task.encoded.rows, queries=40, seed=seed)

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.allclose(drawn(0), drawn(1))


def missed(task: Task, short: Tensor, before: Any) -> float:
    """The squared error of what the first layer's queries read after the short prefix, relative to what they should."""
    after = queries(task, Prefix.unstack(short, torch.float32))
    wrong, whole = 0.0, 0.0
    for head in range(task.base.geometry.kv_heads):
        for (_, _, read), (_, _, target) in zip(after[0][head], before[0][head], strict=True):
            wrong += float((read - target).square().sum())
            whole += float(target.square().sum())
    return wrong / whole


def test_steps_on_keys_lower_the_error_of_what_is_read_and_leave_slot_0(task: Task) -> None:
    long = long_prefix(task)
    chosen, moved = (fewer_slots(task.base, long, SLOTS, task.encoded.rows, key_steps=steps) for steps in (0, 20))
    before = queries(task, long)
    assert missed(task, moved, before) < 0.7 * missed(task, chosen, before)
    torch.testing.assert_close(moved[0, :, 0], chosen[0, :, 0])
    assert not torch.allclose(moved[1:, 0, 0], chosen[1:, 0, 0], atol=1e-3)
