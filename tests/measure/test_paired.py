"""Paired comparisons: against scipy, on null pairs, and the correction for their number."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from kvopt.measure.bootstrap import bounds, drawn_rows
from kvopt.measure.paired import LEVEL, holm, optimism, paired_difference, sign_flip_p


def uneven_rows(rng: np.random.Generator, pairs: int, rows: int, effect: float = 0.0) -> tuple[np.ndarray, ...]:
    """Pairs of contexts with equal KL but for ``effect``: rows differ in length and difficulty, tails are heavy."""
    counts = np.maximum(1, rng.lognormal(3, 0.6, (pairs, rows))).round()
    hard = rng.gamma(1.0, 1.0, (pairs, rows)) * counts
    first, second = (hard * rng.gamma(0.7, 1 / 0.7, (pairs, rows)) for _ in range(2))
    return (1 + effect) * first, second, counts


@pytest.mark.parametrize("rows", [2, 7, 12])
def test_few_rows_are_scipys_exact_permutation_test(rows: int) -> None:
    differences = np.random.default_rng(rows).standard_normal(rows) + 0.4
    exact = stats.permutation_test(
        (differences,), np.sum, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert sign_flip_p(differences) == pytest.approx(exact.pvalue)


def test_many_rows_are_near_the_exact_test_and_never_certain() -> None:
    rng = np.random.default_rng(4)
    differences = rng.standard_normal(13) + 0.6
    signs = np.array(np.meshgrid(*[[-1, 1]] * 13)).reshape(13, -1)
    exact = np.mean(np.abs(differences @ signs) >= abs(differences.sum()) - 1e-12)
    assert sign_flip_p(differences) == pytest.approx(exact, abs=0.01)
    assert sign_flip_p(np.ones(200)) == pytest.approx(1e-4)


def test_the_difference_is_weighted_by_tokens_and_its_interval_is_of_the_same_draws() -> None:
    first, second, counts = np.array([1.0, 30.0, 2.0]), np.array([0.5, 10.0, 3.0]), np.array([1, 20, 4])
    found = paired_difference(first, second, counts, seed=3, resamples=500)
    assert found.mean == pytest.approx((0.5 + 20 - 1) / 25)
    draws = drawn_rows(3, 3, 500)
    expected = bounds(np.array([(first - second)[d].sum() / counts[d].sum() for d in draws]))
    assert found.ci95 == pytest.approx([float(end) for end in expected])
    assert found.p == 0.75  # of 8 signs, 6 give a sum as large
    alone = paired_difference(first[:1], second[:1], counts[:1])
    assert (alone.mean, alone.ci95, alone.p) == (0.5, None, None)


@pytest.mark.parametrize("rows", [10, 24])
def test_equal_contexts_are_told_apart_as_often_as_the_level_says(rows: int) -> None:
    first, second, _ = uneven_rows(np.random.default_rng(rows), 1000, rows)
    found = np.mean([sign_flip_p(a - b) <= LEVEL for a, b in zip(first, second, strict=True)])
    assert found == pytest.approx(LEVEL, abs=0.014), "1000 pairs: two standard errors"


def test_it_finds_more_than_intervals_that_do_not_overlap() -> None:
    first, second, counts = uneven_rows(np.random.default_rng(1), 150, 40, effect=0.8)
    paired = apart = 0
    for a, b, count in zip(first, second, counts, strict=True):
        paired += sign_flip_p(a - b) <= LEVEL
        draws = drawn_rows(len(count), 0, 400)
        (low, _), (_, high) = (bounds(sums[draws].sum(-1) / count[draws].sum(-1)) for sums in (a, b))
        apart += low > high
    assert paired > 2 * apart


def test_holm_multiplies_by_what_is_left_and_never_falls() -> None:
    assert holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.03, 0.06, None, 0.06])
    assert holm([0.9, 0.6]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_picking_the_lowest_of_equal_contexts_looks_better_than_it_is() -> None:
    rng = np.random.default_rng(2)
    counts = np.full(30, 10)
    equal = rng.gamma(2, 5, (12, 30))
    apart = equal + 1000 * np.arange(12)[:, None]
    cost = optimism(equal, counts)
    assert cost is not None
    spread = (equal.sum(-1) / 300).std()
    assert 0.5 * spread < cost < 3 * spread
    assert optimism(apart, counts) == pytest.approx(0, abs=0.02)
    assert optimism(equal[:1], counts) is None
