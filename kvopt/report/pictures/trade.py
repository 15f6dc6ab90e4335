"""Steadiness against forgetting: one point an arm of a study, and the Pareto front. Low and far left is good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from kvopt.report.pictures.drawing import Labels, Picture, Scale

WIDTH, HEIGHT = 420, 320
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 34, 46


@dataclass(frozen=True)
class Point:
    """An arm: how much it has forgotten, and how much its results vary with the wording."""

    label: str
    forgetting: float
    unsteadiness: float
    reference: bool = False


def trade_front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in both, the least forgetting first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.forgetting, p.unsteadiness, p.label)):
        if not front or point.unsteadiness < front[-1].unsteadiness:
            front.append(point)
    return front


def trade_picture(points: Sequence[Point], x_words: str, y_words: str, *, id: str) -> Markup:
    """``points`` with what their two numbers are called."""
    x = _scale([p.forgetting for p in points], LEFT, WIDTH - RIGHT)
    y = _scale([p.unsteadiness for p in points], HEIGHT - BOTTOM, TOP)
    front = trade_front(points)
    words = "; ".join(f"{p.label}: {x_words} {p.forgetting:.3g}, {y_words} {p.unsteadiness:.3g}" for p in points)
    names = ", ".join(p.label for p in front)
    picture = Picture(id, WIDTH, HEIGHT, "Steadiness against forgetting", f"{words}. On the Pareto front: {names}.")
    picture.axes(x, y, x_words, y_words, x_ticks=5, y_ticks=5)
    labels = Labels(LEFT + 2, WIDTH - 4, top=TOP - 8, bottom=HEIGHT - BOTTOM - 2)
    if len(front) > 1:
        stairs = [(x(front[0].forgetting), y(front[0].unsteadiness))]
        for point in front[1:]:
            stairs += [(x(point.forgetting), stairs[-1][1]), (x(point.forgetting), y(point.unsteadiness))]
        picture.line(stairs, "front")
    for point in points:
        at = x(point.forgetting), y(point.unsteadiness)
        labels.keep_free(*at)
        style = "front-mark" if point in front else ""
        tip = f"{point.label}: {x_words} {point.forgetting:.3g}, {y_words} {point.unsteadiness:.3g}"
        picture.mark(*at, "text" if point.reference else "kv", 5, style, tip)
    for point in points:
        if place := labels.place(x(point.forgetting), y(point.unsteadiness), point.label):
            picture.text(place[0], place[1], point.label, "label", place[2])
    return picture.svg()


def _scale(values: Sequence[float], start: float, end: float) -> Scale:
    low, high = min(values), max(values)
    room = (high - low) * 0.15 or abs(high) * 0.15 or 0.01
    return Scale(low - room, high + room, start, end)
