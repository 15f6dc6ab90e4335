"""AP, BWT and FWT on matrices worked out by hand."""

from __future__ import annotations

import pytest

from kvopt.train.sequence.transfer import transfer

# rows: before training, after task 1, 2, 3; columns: tasks 1, 2, 3
R = [
    [10.0, 20.0, 30.0],
    [50.0, 24.0, 31.0],
    [40.0, 60.0, 36.0],
    [44.0, 57.0, 70.0],
]


def test_the_three_averages_of_a_matrix_worked_out_by_hand():
    found = transfer(R)
    assert found.average == pytest.approx((44 + 57 + 70) / 3)
    # after task 2: task 1 fell by 10; after task 3: task 1 by 6 and task 2 by 3
    assert found.backward == pytest.approx((-10 + (-6 - 3) / 2) / 2)
    # after task 1: tasks 2 and 3 rose by 4 and 1; after task 2: task 3 by 6
    assert found.forward == pytest.approx(((4 + 1) / 2 + 6) / 2)


def test_one_task_has_an_average_and_no_transfer():
    assert transfer([[0.1], [0.8]]).document.to_json() == {"AP": 0.8, "BWT": None, "FWT": None}


@pytest.mark.parametrize("wrong", [[[1.0, 2.0]], [[1.0], [2.0], [3.0]], [], [[1.0], [float("nan")]]])
def test_a_matrix_that_is_not_r_is_refused(wrong):
    with pytest.raises(ValueError, match="R "):
        transfer(wrong)
