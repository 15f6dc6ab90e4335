"""Schedules: what an epoch holds, seeds, and choices."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvopt.config.students import StudentConfig
from kvopt.train.schedules.state_adaptive import AdaptiveSchedule
from kvopt.train.stream import Stream, draws, permutation

EPOCHS_1_AND_2 = [(1, 2), (4, 2), (0, 2), (2, 2), (5, 2), (3, 0), (1, 2), (3, 1), (5, 1), (2, 1), (0, 2), (4, 2)]
ORDER = (3, 2, 0, 1, 4)


def schedule(kind: str | dict[str, Any], rows: int, weights: tuple[float, ...], seed: int = 0) -> Stream:
    contexts = [{"context": f"c{i}", "weight": w} for i, w in enumerate(weights)]
    config = StudentConfig.model_validate({"name": "s", "contexts": contexts, "schedule": kind})
    return Stream(config.schedule, rows, weights, seed)


def items(of: Stream, start: int, stop: int, kept: tuple[int, ...] = ()) -> list[tuple[int, int]]:
    return [(of.row(p), of.context(p, kept)) for p in range(start, stop)]


def test_expand_shows_every_row_under_every_context_as_often_as_it_weighs() -> None:
    of = schedule("expand", 5, (1, 2, 1))
    assert of.per_epoch == 20
    for epoch in range(3):
        seen = Counter(items(of, 20 * epoch, 20 * (epoch + 1)))
        assert seen == {(row, context): (1, 2, 1)[context] for row in range(5) for context in range(3)}


def test_resample_shows_every_row_once_an_epoch_and_draws_by_weight() -> None:
    of = schedule("resample", 50, (1, 3))
    assert of.per_epoch == 50
    drawn = items(of, 0, 50 * 40)
    for epoch in range(40):
        assert sorted(row for row, _ in drawn[50 * epoch : 50 * (epoch + 1)]) == list(range(50))
    share = sum(context for _, context in drawn) / len(drawn)
    assert share == pytest.approx(0.75, abs=0.03)
    first, second = dict(drawn[:50]), dict(drawn[50:100])
    assert first != second


def test_resample_every_holds_a_context_for_so_many_steps() -> None:
    """PAFT: all items of K steps meet one wording, drawn by weight."""
    one = schedule({"kind": "resample", "every": 5}, 8, (1, 1, 2))
    of = replace(one, batch_size=4)
    drawn = items(of, 0, 20 * 400)
    blocks = [{context for _, context in drawn[20 * i : 20 * (i + 1)]} for i in range(400)]
    assert all(len(block) == 1 for block in blocks)
    shares = Counter(next(iter(block)) for block in blocks)
    assert shares[2] / 400 == pytest.approx(0.5, abs=0.08)
    assert shares[0] / 400 == pytest.approx(0.25, abs=0.08)
    assert sorted(row for row, _ in drawn[:8]) == list(range(8)), "rows come once an epoch as ever"
    assert items(of, 4000, 4100) == drawn[4000:4100], "a resumed run meets the same"
    assert one.schedule.model_dump() == {"kind": "resample", "every": 5}
    assert schedule("resample", 8, (1, 1)).schedule.model_dump() == {"kind": "resample"}


@pytest.mark.parametrize("kind", ["expand", "resample"])
def test_epochs_and_seeds_have_their_own_order(kind: str) -> None:
    of, again, other = (schedule(kind, 20, (1, 1), seed) for seed in (1, 1, 2))
    n = of.per_epoch
    assert items(of, 0, 2 * n) == items(again, 0, 2 * n)
    assert items(of, 0, n) != items(of, n, 2 * n)
    assert items(of, 0, n) != items(other, 0, n)


def test_orders_and_draws_are_those_of_earlier_versions_whatever_was_drawn_before() -> None:
    """A student that is resumed, or trained again years later, meets the same rows under the same contexts."""
    for noise in (1, 2):
        torch.manual_seed(noise)
        permutation.cache_clear()
        draws.cache_clear()
        of = schedule("resample", 6, (1, 3, 2), seed=5)
        assert items(of, 6, 18) == EPOCHS_1_AND_2
        assert permutation(5, 4, 3) == ORDER


def test_state_adaptive_keeps_the_lowest_and_draws_among_them() -> None:
    of = schedule({"kind": "state-adaptive", "keep": 2, "every": 5, "rows": 7}, 30, (1, 1, 1))
    assert isinstance(of.schedule, AdaptiveSchedule)
    assert of.schedule.scored_rows == 7
    assert of.schedule.choose([3.0, 1.0, 2.0]) == (1, 2)
    assert of.schedule.choose([1.0, 1.0, 1.0]) == (0, 1)
    assert {context for _, context in items(of, 0, 30, (1, 2))} == {1, 2}
    assert [step for step in range(12) if of.schedule.rescores_at(step)] == [0, 5, 10]


def test_state_adaptive_draws_anew_for_each_row_and_epoch() -> None:
    of = schedule({"kind": "state-adaptive", "keep": 2}, 30, (1, 1, 1))
    epochs = [dict(items(of, 30 * epoch, 30 * (epoch + 1), (0, 2))) for epoch in range(3)]
    for one, two in ((0, 1), (1, 2), (0, 2)):
        assert 5 <= sum(epochs[one][row] != epochs[two][row] for row in range(30)) <= 25


def test_state_adaptive_once_is_before_the_first_step() -> None:
    of = schedule({"kind": "state-adaptive"}, 30, (1, 1))
    assert [step for step in range(12) if of.schedule.rescores_at(step)] == [0]
    assert {context for _, context in items(of, 0, 30, (1,))} == {1}


def test_rows_do_not_depend_on_what_was_chosen() -> None:
    of = schedule({"kind": "state-adaptive"}, 30, (1, 1))
    assert [row for row, _ in items(of, 0, 60, (0,))] == [row for row, _ in items(of, 0, 60, (1,))]
