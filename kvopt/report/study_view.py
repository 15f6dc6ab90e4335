"""What the page shows of a study: its verdict, paired differences, steadiness against forgetting, and in the details
arms over seeds and what the n-th mutation buys.
"""

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
from kvopt.report.choice import shown_interval
from kvopt.report.pictures import Mark, growth_picture, interval_strips, trade_picture
from kvopt.report.pictures.trade import Point, trade_front
from kvopt.report.study_words import (
    differs,
    interval_of,
    lower_is_better,
    measured_somewhere,
    path_words,
    steadiness_path,
    verdict,
)


@dataclass(frozen=True)
class StudyView:
    """The study's part of the page."""

    study: StudyDocument
    verdict: Sequence[str]
    forest: Sequence[tuple[str, str, Markup]]
    alike: Sequence[str]
    trade: tuple[Markup, Sequence[str]] | None
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
    paths = measured_somewhere(study, [path for path in wanted if path in known])
    drawn = [path for path in (*groups[:3], f"wordings/{headline}/spread", *likelihoods[2:]) if path in known]
    compared = measured_somewhere(study, compared_paths(study.headlines, known))
    return StudyView(
        study,
        verdict(study),
        [picture for n, path in enumerate(_told(study, compared)) if (picture := _forest(study, path, f"forest-{n}"))],
        [path_words(path) for path in _told(study, compared) if _measured_alike(study, path)],
        _trade(study),
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
                path_words(path),
                curve,
                growth_picture(
                    path_words(path),
                    curve.values,
                    curve.fit.model_dump() if curve.fit else None,
                    id=f"growth-{position}",
                ),
            )
            for position, (path, curve) in enumerate((study.curve or {}).items())
            if curve.values
        ],
        [(name, fit) for name, fit in study.sweep.items() if fit is not None],
    )


def _told(study: StudyDocument, compared: Sequence[str]) -> list[str]:
    """What the forest plot shows: everything compared, forgetting after the others, and steadiness."""
    steady = steadiness_path(study)
    paths = [*compared, *([steady] if steady else [])]
    return sorted(paths, key=lambda path: path in FORGETTING)


def _forest(study: StudyDocument, path: str, id: str) -> tuple[str, str, Markup] | None:
    """One quantity of every arm minus that of the reference arm, with its interval; None where no arm has one."""
    marks = []
    for arm in study.arms:
        against = (arm.against_reference or {}).get(path)
        if against is None or against.difference.mean is None:
            continue
        low, high = interval_of(against.difference) or (None, None)
        marks.append(Mark(arm.name, against.difference.mean, low, high, (), "kv"))
    if not any(_differs(arm, path) for arm in study.arms):
        return None
    words = path_words(path)
    lower = lower_is_better(path)
    side = "" if lower is None else "left of the line is better" if lower else "right of the line is better"
    title = f"{words}: difference from {study.reference}"
    return words, side, interval_strips(marks, title, f"difference from {study.reference}", id=id, zero=True)


def _measured_alike(study: StudyDocument, path: str) -> bool:
    """Whether arms were compared with the reference arm in this, and none differs."""
    found = [against for arm in study.arms if (against := (arm.against_reference or {}).get(path))]
    return any(one.difference.mean is not None for one in found) and not any(_differs(arm, path) for arm in study.arms)


def _differs(arm: ArmResult, path: str) -> bool:
    against = (arm.against_reference or {}).get(path)
    return against is not None and against.difference.mean is not None and differs(against.difference)


def _trade(study: StudyDocument) -> tuple[Markup, Sequence[str]] | None:
    """Steadiness against forgetting, and the arms on the front; None where fewer than two arms have both."""
    steady = steadiness_path(study)
    points = []
    for arm in study.arms:
        forgotten, varied = arm.values.get(FORGETTING[0]), arm.values.get(steady or "")
        if forgotten and varied and forgotten.mean is not None and varied.mean is not None:
            points.append(Point(arm.name, forgotten.mean, varied.mean, arm.name == study.reference))
    if steady is None or len(points) < 2:
        return None
    picture = trade_picture(points, "forgetting: KL from the base", path_words(steady), id="trade")
    return picture, [point.label for point in trade_front(points)]


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
            words = path_words(path)
            picture = interval_strips(marks, f"{words} by arm", words, id=f"{id}-{position}", zero=zero)
            pictures.append((words, picture))
    return pictures


def _mark(arm: ArmResult, path: str) -> Mark | None:
    value = arm.values.get(path)
    if value is None or value.mean is None:
        return None
    low, high = shown_interval(value.ci95) or (None, None)
    label = arm.name if arm.budget == "steps" else f"{arm.name} ({arm.budget})"
    return Mark(label, value.mean, low, high, tuple(v for v in value.seeds if v is not None), "kv")
