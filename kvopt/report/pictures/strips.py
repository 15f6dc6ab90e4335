"""One quantity of several students: a mark with its interval for each, and its spread over wordings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from kvopt.report.pictures.drawing import CHARACTER, LINE, Picture, Scale

WIDTH = 480
RIGHT, TOP, BOTTOM, ROW = 20, 12, 40, 26


@dataclass(frozen=True)
class Mark:
    """One line of the picture: a value with its interval, and small marks of what it is made of."""

    label: str
    mean: float
    low: float | None = None
    high: float | None = None
    dots: tuple[float, ...] = ()
    accent: str = "text"


def interval_strips(marks: Sequence[Mark], title: str, unit: str, *, id: str, zero: bool = False) -> Markup:
    """A line for each mark, on one scale that holds 0 where ``zero``."""
    values = [v for m in marks for v in (m.mean, m.low, m.high, *m.dots) if v is not None] + ([0.0] if zero else [])
    left = min(max(len(m.label) for m in marks) * CHARACTER + 16, WIDTH * 0.45)
    room = (max(values) - min(values)) * 0.05 or abs(max(values)) * 0.05 or 0.01
    x = Scale(min(values) - room, max(values) + room, left, WIDTH - RIGHT)
    height = TOP + ROW * len(marks) + BOTTOM
    words = "; ".join(f"{m.label} {m.mean:.4g}" for m in marks)
    picture = Picture(id, WIDTH, height, title, f"{unit}: {words}.")
    for value in x.ticks(5):
        picture.line([(x(value), TOP), (x(value), height - BOTTOM)], "zero" if value == 0 else "grid")
        picture.text(x(value), height - BOTTOM + LINE + 2, f"{value:g}", "tick", "middle")
    picture.text(x.end, height - 6, unit, "axis-label", "end")
    for number, mark in enumerate(marks):
        y = TOP + ROW * (number + 0.5)
        picture.text(left - 12, y + 4, mark.label, "label", "end")
        for dot in mark.dots:
            picture.mark(x(dot), y, "text", 2.5, "hollow", f"{dot:.4g}")
        if mark.low is not None and mark.high is not None:
            picture.line([(x(mark.low), y), (x(mark.high), y)], f"whisker {mark.accent}")
        picture.mark(x(mark.mean), y, mark.accent, 4.5, title=f"{mark.label}: {mark.mean:.4g}")
    return picture.svg()
