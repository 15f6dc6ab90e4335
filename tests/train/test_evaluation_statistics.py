"""Means, statistics over contexts, intervals and consistency, by hand and against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from kvopt.measure.bootstrap import bounds, row_draws
from kvopt.measure.ratios import near_best, ratio_of, redrawn, retention, summarize
from kvopt.train.json_answers import agreement

RATIOS = {
    "a": [{"hit": (1, 1), "f1": (2, 4)}, {"hit": (0, 1), "f1": (0, 2)}, {"hit": (1, 1), "f1": (4, 4)}],
    "b": [{"hit": (0, 1), "f1": (2, 2)}, {"hit": (0, 1), "f1": (2, 6)}, {"hit": (1, 1), "f1": (0, 2)}],
}


def test_a_context_has_the_ratio_of_sums_and_a_group_the_statistics_of_its_contexts():
    contexts, groups = summarize(RATIOS, {"both": ["a", "b"]}, seed=0, resamples=100)
    assert contexts["a"]["f1"].to_json()["mean"] == pytest.approx(6 / 10)
    assert contexts["b"]["f1"].to_json()["mean"] == pytest.approx(4 / 10)
    f1 = groups["both"]["f1"].to_json()
    assert (f1["mean"], f1["min"], f1["max"]) == pytest.approx((0.5, 0.4, 0.6))
    assert f1["std"] == pytest.approx(0.1)
    assert f1["spread"] == pytest.approx(0.2)


def test_the_interval_of_a_mean_is_scipys_percentile_bootstrap():
    values = np.random.default_rng(1).normal(size=40)
    found = ratio_of([(float(v), 1.0) for v in values], seed=7, resamples=500).to_json()
    expected = bootstrap(
        (values,), np.mean, vectorized=True, method="percentile", n_resamples=500, batch=500,
        rng=np.random.default_rng(7),
    ).confidence_interval  # fmt: skip
    assert found["mean"] == pytest.approx(values.mean())
    assert found["ci95"] == pytest.approx([expected.low, expected.high])


def test_a_group_draws_the_same_examples_under_every_context():
    rows = [{"x": (float(v), 1.0)} for v in np.random.default_rng(2).normal(size=30)]
    opposite = [{"x": (-row["x"][0], 1.0)} for row in rows]
    _, groups = summarize({"a": rows, "b": opposite}, {"both": ["a", "b"]}, seed=0, resamples=200)
    assert groups["both"]["x"].to_json()["mean"] == pytest.approx(0, abs=1e-12)
    assert groups["both"]["x"].to_json()["ci95"] == pytest.approx([0, 0], abs=1e-12)  # unpaired draws would not cancel


def test_what_does_not_exist_is_none():
    empty = [{"f1": (0, 0)}, {"f1": (0, 0)}]
    contexts, groups = summarize({"a": empty}, {"one": ["a"]}, seed=0, resamples=100)
    assert contexts["a"]["f1"].to_json() == {"mean": None, "ci95": None}
    assert set(groups["one"]["f1"].to_json().values()) == {None}
    assert ratio_of([(1, 1)], seed=0, resamples=100).to_json() == {"mean": 1.0, "ci95": None}


def test_consistency_is_the_share_of_agreeing_pairs():
    answers = [["yes", '{"a": 1, "b": 2}'], ["yes", '{"b": 2, "a": 1}'], ["no", "{}"]]
    assert agreement(answers) == [(1.0, 3.0), (1.0, 3.0)]


def test_draws_of_rows_are_those_of_the_formula_and_the_same_for_every_model():
    draws = row_draws(3, 5, 50)
    assert (draws.sum(1) == 3).all()
    assert (draws == row_draws(3, 5, 50)).all()
    found = redrawn(RATIOS, {"both": ["a", "b"]}, draws)["both"]["f1"]
    for i, counts in enumerate(draws):
        taken = [j for j, count in enumerate(counts) for _ in range(int(count))]
        values = []
        for rows in RATIOS.values():
            numerator, denominator = (sum(rows[j]["f1"][k] for j in taken) for k in (0, 1))
            values.append(numerator / denominator)
        assert (found[0][i], found[1][i]) == pytest.approx((sum(values) / 2, max(values) - min(values)))


def test_draws_of_a_study_give_the_interval_of_the_evaluation():
    rows = [{"x": (float(v), 1.0)} for v in np.random.default_rng(2).normal(size=30)]
    contexts, _ = summarize({"a": rows}, {}, seed=4, resamples=500)
    drawn = redrawn({"a": rows}, {"one": ["a"]}, row_draws(30, 4, 500))["one"]["x"][0]
    assert list(bounds(drawn)) == contexts["a"]["x"].to_json()["ci95"]


def test_retention_is_the_value_divided_by_that_under_the_original_in_the_same_draws():
    contexts, groups = retention(RATIOS, {"both": ["a", "b"]}, "a", seed=3, resamples=400)
    assert contexts["a"]["f1"].mean == pytest.approx(1)
    assert contexts["a"]["f1"].ci95 is None, "a draw of the second row alone has no value"
    assert contexts["b"]["f1"].mean == pytest.approx((4 / 10) / (6 / 10))
    assert groups["both"]["hit"].mean == pytest.approx((2 / 3 + 1 / 3) / 2 / (2 / 3))
    rows = {"a": [{"x": (i + 1.0, 1.0)} for i in range(20)], "b": [{"x": (i % 3 + 1.0, 1.0)} for i in range(20)]}
    found = retention(rows, {}, "a", seed=3, resamples=400)[0]["b"]["x"]
    draws = np.random.default_rng(3).integers(20, size=(400, 20))
    a, b = (np.array([row["x"][0] for row in rows[name]])[draws].mean(1) for name in "ab")
    assert retention(rows, {}, "a", seed=3, resamples=400)[0]["a"]["x"].ci95 == pytest.approx((1, 1))
    assert found.ci95 == pytest.approx(tuple(np.percentile(b / a, [2.5, 97.5])))


def test_retention_of_nothing_is_none():
    nothing = {"a": [{"hit": (0, 1)}, {"hit": (0, 1)}], "b": [{"hit": (1, 1)}, {"hit": (0, 1)}]}
    contexts, groups = retention(nothing, {"both": ["a", "b"]}, "a", seed=0, resamples=100)
    assert contexts["b"]["hit"].to_json() == groups["both"]["hit"].to_json() == {"mean": None, "ci95": None}


def test_near_best_counts_wordings_at_most_005_below_the_best():
    assert near_best([0.9, 0.85, 0.8499, 0.1]) == 0.5
    assert near_best([0.0, 0.0]) == 1
    assert near_best([0.5, None]) is None
    assert near_best([]) is None
