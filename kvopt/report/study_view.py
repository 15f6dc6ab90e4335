"""What the page shows of a study: arms over seeds, robustness, forgetting, and what the n-th mutation buys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from kvopt.documents.study_file import (
    FORGETTING,
    LIKELIHOOD,
    SHOWN_GROUPS,
    ArmResult,
    CurveFit,
    ExplainedVariance,
    OverSeeds,
    StudyDocument,
    compared_paths,
)
from kvopt.report.pictures import Mark, growth_picture, interval_strips


@dataclass(frozen=True)
class StudyView:
    """The study's part of the page."""

    study: StudyDocument
    paths: Sequence[str]
    rows: Sequence[tuple[ArmResult, Sequence[tuple[OverSeeds | None, bool | None]]]]
    compared: Sequence[str]
    differences: Sequence[tuple[ArmResult, Sequence[OverSeeds | None]]]
    robustness: Sequence[tuple[str, Markup]]
    forgetting: Sequence[tuple[str, Markup]]
    growth: Sequence[tuple[str, CurveFit, Markup]]
    explained: Sequence[tuple[str, ExplainedVariance]]


def study_view(study: StudyDocument) -> StudyView:
    """Tables and pictures of one study."""
    known = list(dict.fromkeys(path for arm in study.arms for path in arm.values))
    headline = study.headlines[0] if study.headlines else ""
    groups = [f"{group}/{headline}" for group in SHOWN_GROUPS]
    likelihoods = [f"{group}/{LIKELIHOOD}" for group in SHOWN_GROUPS]
    wanted = [*groups, f"wordings/{headline}/spread", "wordings/consistency", *likelihoods, *FORGETTING]
    paths = [path for path in wanted if path in known]
    drawn = [path for path in (*groups[:3], f"wordings/{headline}/spread", *likelihoods[2:]) if path in known]
    compared = compared_paths(study.headlines, known)
    return StudyView(
        study,
        paths,
        [(arm, [_cell(arm, path) for path in paths]) for arm in study.arms],
        compared,
        [
            (arm, [against.difference if (against := arm.against_reference.get(path)) else None for path in compared])
            for arm in study.arms
            if arm.against_reference
        ],
        _pictures(study, drawn, "study-robust", zero=False),
        _pictures(study, [path for path in FORGETTING if path in known], "study-forgetting", zero=True),
        [
            (
                path,
                curve,
                growth_picture(
                    path, curve.values, curve.fit.model_dump() if curve.fit else None, id=f"growth-{position}"
                ),
            )
            for position, (path, curve) in enumerate((study.curve or {}).items())
            if curve.values
        ],
        [(name, fit) for name, fit in study.sweep.items() if fit is not None],
    )


def _cell(arm: ArmResult, path: str) -> tuple[OverSeeds | None, bool | None]:
    """A value, and whether it is separable from the reference arm's (None where that is not known)."""
    against = (arm.against_reference or {}).get(path)
    return arm.values.get(path), against.separable if against else None


def _pictures(study: StudyDocument, paths: Sequence[str], id: str, *, zero: bool) -> list[tuple[str, Markup]]:
    pictures = []
    for position, path in enumerate(paths):
        marks = [mark for arm in study.arms if (mark := _mark(arm, path))]
        base = study.base_values.get(path)
        if base is not None:
            marks.insert(0, Mark("base", base, accent="text"))
        if marks:
            picture = interval_strips(marks, f"{path} by arm", path, id=f"{id}-{position}", zero=zero)
            pictures.append((path, picture))
    return pictures


def _mark(arm: ArmResult, path: str) -> Mark | None:
    value = arm.values.get(path)
    if value is None or value.mean is None:
        return None
    low, high = value.ci95 or (None, None)
    label = arm.name if arm.budget == "steps" else f"{arm.name} ({arm.budget})"
    return Mark(label, value.mean, low, high, tuple(v for v in value.seeds if v is not None), "kv")
