"""Means over seeds, the fit of the curve, and R², against hand-made numbers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from kvopt.train.evaluation.results import Measured
from kvopt.train.study.curve import explained, fit_curve, power_law
from kvopt.train.study.seeds import compared, over_rows_and_seeds, over_seeds, paired_p
from kvopt.train.study.values import draws_by_path


def test_the_interval_over_three_seeds_is_students():
    found = over_seeds([0.4, 0.5, 0.6]).to_json()
    assert found["mean"] == pytest.approx(0.5)
    assert found["std"] == pytest.approx(0.1)
    half = 4.302652729911275 * 0.1 / 3**0.5  # t(0.975, 2) from a table
    assert found["ci95"] == pytest.approx([0.5 - half, 0.5 + half])


def test_one_seed_has_no_interval_and_a_missing_value_no_mean():
    assert over_seeds([0.5]).to_json() == {"mean": 0.5, "ci95": None, "std": None, "seeds": [0.5]}
    assert over_seeds([0.5, None]).to_json()["mean"] is None


def test_the_paired_test_is_students_over_seeds_where_rows_are_many():
    """scipy's one-sample t test, where rows add nothing; Welch's where both add."""
    differences = [0.3, 0.1, 0.45]
    assert paired_p(differences, 0.0, 100) == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)
    rows = np.random.default_rng(0).normal(0.2, 1.0, 30)
    welch = stats.ttest_ind(differences, rows - rows.mean(), equal_var=False).pvalue
    assert paired_p(differences, float(rows.var(ddof=1) / 30), 30) == pytest.approx(welch)


def test_the_same_differences_are_no_evidence_where_rows_or_seeds_differ_as_much():
    assert paired_p([0.25, 0.25, 0.25], 0.0, 10) == 0.0
    assert paired_p([0.0, 0.0, 0.0], 0.0, 10) == 1.0
    assert paired_p([0.2, 0.2, 0.2], 0.04, 10) > 0.3, "one standard error of rows"
    assert paired_p([0.2], 0.01, 10) is None, "one seed says nothing of other seeds"
    assert paired_p([0.2, 0.3], 0.01, 1) is None


def test_equal_arms_are_told_apart_in_five_studies_of_a_hundred():
    rng, found = np.random.default_rng(0), 0
    for _ in range(1000):
        rows, of_seeds = rng.normal(size=40), rng.normal(size=(4, 1)) * 0.15
        differences = rows + of_seeds + rng.normal(size=(4, 40)) * 0.5
        over_rows = differences.mean(0).var(ddof=1) / 40
        found += paired_p(list(differences.mean(1)), over_rows, 40) <= 0.05
    assert 0.03 <= found / 1000 <= 0.07


def test_a_paired_difference_takes_each_seeds_own():
    a, b = over_seeds([1.0, 5.0, 9.0]), over_seeds([0.5, 4.5, 8.5])
    draws = [np.array([0.4, 0.5, 0.6, 0.5])] * 3
    found = compared(a, b, draws, rows=4)
    assert found.difference.ci95 == pytest.approx([0.5, 0.5])
    assert found.p == pytest.approx(paired_p([0.5] * 3, float(np.var(draws[0])) * 4 / 3, 4))
    assert found.p < 0.01
    assert compared(a, b).p is None, "without draws of rows there is no test"
    assert compared(over_seeds([1.0]), over_seeds([2.0]), draws[:1], rows=4).p is None


def test_the_bootstrap_over_rows_and_seeds_holds_the_variance_of_both():
    draws = np.random.default_rng(0).normal(size=(2, 4000)) * 0.1 + [[1.0], [3.0]]
    low, high = over_rows_and_seeds([{"x": one} for one in draws], seed=0)["x"]
    # half of the draws take both seeds (mean 2), a quarter one seed twice: percentiles lie in those quarters
    assert low == pytest.approx(1 - 1.2816 * 0.1, abs=0.02)  # the 10th percentile of a quarter is the 2.5th of all
    assert high == pytest.approx(3 + 1.2816 * 0.1, abs=0.02)


def test_of_one_seed_the_bootstrap_is_over_rows_alone():
    draws = np.random.default_rng(0).normal(size=1000)
    assert over_rows_and_seeds([{"x": draws}], seed=3)["x"] == pytest.approx(list(np.percentile(draws, [2.5, 97.5])))


def test_a_draw_without_a_value_gives_no_interval():
    draws = [{"x": np.array([1.0, np.nan])}, {"x": np.array([1.0, 2.0])}]
    assert over_rows_and_seeds(draws, seed=0)["x"] is None


def test_a_single_row_is_not_drawn_again():
    answered = {"original": [{"hit": (1.0, 1.0)}]}
    scored = {"original": [{"gold_nll": (2.0, 4.0)}, {"gold_nll": (1.0, 1.0)}]}
    one, two = [{"looks_like_task": (1.0, 1.0)}], [{"looks_like_task": (1.0, 1.0)}] * 2
    groups, consistency = {"original": ["original"]}, {"wordings": [(1.0, 1.0)]}
    found = draws_by_path(Measured(groups, answered, scored, consistency, one, [two], None), seed=0, resamples=5)
    assert set(found) == {"original/gold_nll", "frozen_prompt/looks_like_task"}


def points(a, b, c, noise=0.0, seeds=3):
    rng = np.random.default_rng(0)
    counts = (0, 1, 2, 4, 8)
    return {
        n: [float(power_law(np.float64(n + 1), a, b, c) + rng.normal() * noise) for _ in range(seeds)] for n in counts
    }


def test_the_fit_finds_the_power_law_and_its_interval_holds_it():
    found = fit_curve(points(-0.3, 0.8, 0.6, noise=0.003)).to_json()
    assert found["fit"]["b"] == pytest.approx(0.8, abs=0.2)
    for name, truth in (("a", -0.3), ("b", 0.8), ("c", 0.6)):
        low, high = found["ci95"][name]
        assert low - 0.03 <= truth <= high + 0.03
    assert found["r2"] > 0.99
    assert found["converged"] > 0.9


def test_r2_of_a_curve_is_the_share_of_the_variance_around_the_mean():
    noisy = points(-0.3, 0.8, 0.6, noise=0.05)
    found = fit_curve(noisy).to_json()
    values = np.array(list(noisy.values()))
    fit = found["fit"]
    law = np.array([fit["a"] * (n + 1.0) ** -fit["b"] + fit["c"] for n in noisy])
    expected = 1 - ((values - law[:, None]) ** 2).sum() / ((values - values.mean()) ** 2).sum()
    assert found["r2"] == pytest.approx(expected, rel=1e-6)
    assert 0.5 < found["r2"] < 0.95


def test_a_curve_that_goes_nowhere_is_told_from_one_that_falls():
    rng = np.random.default_rng(4)
    offsets = [0.0, 0.5, -0.3]  # seeds differ by far more than the curve falls
    falls = {n: [0.05 * (n + 1) ** -0.7 + o + rng.normal() * 0.002 for o in offsets] for n in (0, 1, 2, 4, 8)}
    assert fit_curve(falls).to_json()["p"] < 1e-6
    flat = [
        fit_curve({n: [o + rng.normal() * 0.002 for o in offsets] for n in (0, 1, 2, 4, 8)}).to_json()
        for _ in range(60)
    ]
    ps = [found["p"] for found in flat if found["fit"] is not None]
    assert len(ps) > 15
    assert np.mean(np.array(ps) < 0.05) < 0.2
    assert all(found["p"] is None for found in flat if found["fit"] is None)


def test_exact_points_give_the_exact_law():
    assert fit_curve(points(0.5, 1.5, 0.2)).to_json()["fit"] == pytest.approx({"a": 0.5, "b": 1.5, "c": 0.2}, rel=1e-3)


@pytest.mark.parametrize(
    "values",
    [
        {n: [0.4, 0.4] for n in (0, 1, 2, 4)},  # flat: every b fits
        {n: [float(n), float(n)] for n in (0, 1, 2, 4, 8)},  # rises without end
        {0: [0.0, 0.0], 1: [1.0, 1.0], 2: [1.0, 1.0], 4: [1.0, 1.0]},  # a step: b without end
        {0: [0.1], 1: [0.2]},  # fewer points than parameters
    ],
)
def test_what_is_no_power_law_gets_no_fit(values):
    found = fit_curve(values).to_json()
    assert found["fit"] is None
    assert found["ci95"] is None


def test_one_seed_gives_a_fit_without_an_interval():
    found = fit_curve(points(0.5, 1.5, 0.2, seeds=1)).to_json()
    assert found["fit"] is not None
    assert (found["ci95"], found["converged"]) == (None, None)


def test_r2_of_a_line_and_of_noise():
    x = [0.0, 1.0, 2.0, 3.0]
    assert explained(x, [1.0, 3.0, 5.0, 7.0]).to_json() == pytest.approx(
        {"points": 4, "slope": 2.0, "intercept": 1.0, "r2": 1.0, "p": 0.0}, abs=1e-9
    )
    assert explained(x, [1.0, -1.0, -1.0, 1.0]).to_json()["r2"] == pytest.approx(0, abs=1e-12)


def test_r2_needs_three_points_that_differ():
    assert explained([1.0, 2.0], [1.0, 2.0]) is None
    assert explained([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    assert explained([1.0, None, 2.0, 3.0], [1.0, 5.0, 2.0, 3.0]).to_json()["points"] == 3


def test_two_numbers_of_mutations_give_no_fit_of_three_parameters():
    found = fit_curve({0: [0.30, 0.31, 0.29], 4: [0.20, 0.22, 0.21]}).to_json()
    assert found["fit"] is None
    assert found["ci95"] is None
    assert found["values"]["4"] == [0.20, 0.22, 0.21]
