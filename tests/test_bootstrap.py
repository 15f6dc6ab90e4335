"""Draws and percentiles are those of scipy's percentile bootstrap, to the last digit."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from kvopt.measure.bootstrap import bounds, drawn_rows, row_draws


@pytest.mark.parametrize("rows", [2, 3, 57, 400])
def test_intervals_are_those_of_scipy_to_the_last_digit(rows):
    rng = np.random.default_rng(rows)
    sums, counts = rng.gamma(1.0, size=rows), rng.integers(1, 40, size=rows).astype(np.float64)
    found = bootstrap(
        (sums, counts), lambda total, tokens, axis=-1: total.sum(axis) / tokens.sum(axis), paired=True, vectorized=True,
        method="percentile", n_resamples=500, rng=np.random.default_rng(9),
    ).confidence_interval  # fmt: skip
    drawn = drawn_rows(rows, 9, 500)
    assert bounds(sums[drawn].sum(-1) / counts[drawn].sum(-1)) == (found.low, found.high)


def test_counts_are_those_of_the_drawn_rows():
    counts = row_draws(7, 3, 50)
    for count, drawn in zip(counts, drawn_rows(7, 3, 50), strict=True):
        assert count.tolist() == [list(drawn).count(row) for row in range(7)]


def test_each_row_of_draws_has_bounds_of_its_own_and_none_where_a_draw_has_no_value():
    low, high = bounds(np.stack([np.arange(41.0), np.arange(41.0) * 10, np.full(41, np.nan)]))
    assert (low[:2].tolist(), high[:2].tolist()) == (pytest.approx([1, 10]), pytest.approx([39, 390]))
    assert np.isnan([low[2], high[2]]).all()
    many = np.random.default_rng(0).normal(size=(2, 3, 41))
    low, high = bounds(many)
    assert low.shape == high.shape == (2, 3)
    assert (low[1, 2], high[1, 2]) == bounds(many[1, 2])
