"""A study on the page: its verdict in words, paired differences, and steadiness against forgetting."""

from __future__ import annotations

from typing import Any

import pytest

from kvopt.documents.study_file import StudyDocument
from kvopt.report.pictures.trade import Point, trade_front
from kvopt.report.study_view import study_view
from kvopt.report.study_words import path_words, verdict
from tests.report.made import study


def made(*arms: tuple[str, dict[str, tuple[float, float, float]]], **more: Any) -> StudyDocument:
    """A study of the arm "plain" and these, with differences by path: mean and the two ends of the interval."""
    document = study() | {"curve": None, "sweep": {}, "reference": "plain", **more}
    plain = document["arms"][0] | {"name": "plain", "values": {}, "against_reference": None}
    others = []
    for name, differences in arms:
        against = {
            path: {"difference": {"mean": mean, "ci95": None, "ci95_bootstrap": [low, high]}, "separable": None}
            for path, (mean, low, high) in differences.items()
        }
        values = {path: {"mean": 1.0 + mean, "ci95": None} for path, (mean, _, _) in differences.items()}
        others.append(plain | {"name": name, "values": values, "against_reference": against})
    return StudyDocument.model_validate(document | {"arms": [plain, *others]})


def test_the_best_arm_comes_first_with_numbers_intervals_and_what_they_mean():
    lines = verdict(
        made(
            ("worse", {"templates/gold_nll": (0.2, 0.1, 0.3)}),
            (
                "anchored",
                {"templates/gold_nll": (-0.13, -0.2, -0.05), "forgetting/kl_from_base": (-0.08, -0.1, -0.06)},
            ),
            ("same", {"templates/gold_nll": (0.01, -0.02, 0.04)}),
        )
    )
    assert lines == [
        "anchored against plain: loss under other wordings −0.13 [−0.20, −0.05] (better); forgetting −0.08 [−0.10,"
        " −0.06] (better).",
        "same against plain: loss under other wordings +0.010 [−0.020, +0.040] (cannot be told from no difference).",
        "worse against plain: loss under other wordings +0.20 [+0.10, +0.30] (worse).",
    ]


def test_dust_is_no_difference_and_gets_no_interval_and_no_picture():
    document = made(("a", {"templates/gold_nll": (1e-15, 1e-15, 1e-15), "original/slots.f1": (0.0, 0.0, 0.0)}))
    assert verdict(document) == ["a against plain: loss under other wordings without a difference."]
    view = study_view(document)
    assert not view.forest
    assert list(view.alike) == ["slots.f1 under the original template", "loss under other wordings"]


def test_a_study_of_one_arm_compares_it_with_the_base():
    document = StudyDocument.model_validate(study() | {"arms": study()["arms"][:1]})
    assert verdict(document) == [
        "There is one way of training only, so nothing is compared.",
        "fixed: slots.f1 under the original template went from 0.400 (the base) to 0.500.",
    ]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("none/gold_nll", "loss without a context"),
        ("templates/json-valid", "json-valid under other wordings"),
        ("wordings/gold_nll/spread", "spread of loss over wordings"),
        ("learned/answer_cut/spread", "spread of answers that were cut under learned contexts"),
        ("forgetting/kl_from_base", "forgetting"),
        ("wordings/consistency", "same answer under all wordings"),
    ],
)
def test_paths_are_words(path: str, words: str):
    assert path_words(path) == words


def test_the_front_has_the_arms_that_none_beats_in_both():
    points = [Point("a", 0.1, 0.5), Point("b", 0.2, 0.2), Point("c", 0.3, 0.3), Point("d", 0.1, 0.6)]
    assert [point.label for point in trade_front(points)] == ["a", "b"]


def test_steadiness_and_forgetting_are_one_picture_where_two_arms_have_both():
    view = study_view(StudyDocument.model_validate(study()))
    assert view.trade is not None
    picture, front = view.trade
    assert "Steadiness against forgetting" in picture
    assert front == ["fixed"]
    assert study_view(StudyDocument.model_validate(study() | {"arms": study()["arms"][:1]})).trade is None
