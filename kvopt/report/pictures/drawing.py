"""Scales, ticks and marks of the report's pictures. Coordinates are pixels of the picture's view box, y downwards."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

CHARACTER = 7.4  # width of a letter in labels (semibold, 11.5 px), in pixels
LINE = 14  # height of a label


@dataclass(frozen=True)
class Scale:
    """Values from ``low`` to ``high`` on pixels from ``start`` to ``end``; what lies outside is put on the edge."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        if self.log:
            value = math.log10(value) if value > 0 else low
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values inside: powers of ten (with 2 and 5 where there is room), or multiples of 1, 2 or 5."""
        if not self.log:
            return _linear_ticks(self.low, self.high, most)
        highest = min(math.ceil(math.log10(self.high)), sys.float_info.max_10_exp)
        powers = range(math.floor(math.log10(self.low)), highest + 1)
        for steps in ((1, 2, 5), (1, 3), (1,)):
            ticks = [
                s * 10.0**p for p in powers for s in steps if self.low <= s * 10.0**p * 1.0000001 <= self.high * 1.01
            ]
            if len(ticks) <= most:
                break
        return ticks


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    """Multiples of the smallest 1, 2 or 5 times a power of ten that gives at most ``most`` of them."""
    if high <= low or math.isinf(high - low):
        return [low]
    power = math.floor(math.log10((high - low) / most))
    for step in (factor * 10.0**exponent for exponent in (power, power + 1, power + 2) for factor in (1, 2, 5)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            break
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_scale(values: Sequence[float], start: float, end: float) -> Scale:
    """A logarithmic scale with some room around the positive ``values`` (a decade where there is none)."""
    positive = [v for v in values if v > 0] or [1e-3, 1.0]
    low, high = min(positive) / 1.35, min(max(positive) * 1.35, sys.float_info.max)
    if high / low < 4:
        middle = math.sqrt(low * high)
        low, high = middle / 2, middle * 2
    return Scale(low, high, start, end, log=True)


def plain_number(value: float) -> str:
    """A tick's label."""
    if value == 0:
        return "0"
    return f"{value:g}" if 1e-4 <= abs(value) < 1e5 else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")


@dataclass
class Picture:
    """An SVG that is being drawn; every text and attribute is escaped."""

    id: str
    width: float
    height: float
    title: str
    description: str
    parts: list[Markup] = field(default_factory=list)

    def line(self, points: Sequence[tuple[float, float]], style: str) -> None:
        """Straight lines through the points."""
        path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(Markup('<path class="{}" d="{}"/>').format(style, path))

    def text(self, x: float, y: float, words: str, style: str = "", anchor: str = "start") -> None:
        self.parts.append(
            Markup('<text x="{:.1f}" y="{:.1f}" class="{}" text-anchor="{}">{}</text>').format(
                x, y, style, anchor, words
            )
        )

    def mark(self, x: float, y: float, kind: str, size: float = 4.5, style: str = "", title: str = "") -> None:
        """A point in its kind's shape: text a disc, soft a square, kv a diamond; ``title`` is shown under the mouse."""
        r = size
        if kind == "soft":
            path = f"M{x - r:.1f},{y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}z"
        elif kind == "kv":
            d = r * 1.3
            path = f"M{x:.1f},{y - d:.1f}l{d:.1f},{d:.1f}l{-d:.1f},{d:.1f}l{-d:.1f},{-d:.1f}z"
        else:
            path = f"M{x - r:.1f},{y:.1f}a{r},{r} 0 1 0 {2 * r},0a{r},{r} 0 1 0 {-2 * r},0z"
        self.parts.append(
            Markup('<path class="mark {} {}" d="{}"><title>{}</title></path>').format(kind, style, path, title)
        )

    def axes(self, x: Scale, y: Scale, x_label: str, y_label: str, x_ticks: int = 6, y_ticks: int = 6) -> None:
        """Grid lines and numbers of both scales, and what they measure."""
        for value in y.ticks(y_ticks):
            self.line([(x.start, y(value)), (x.end, y(value))], "grid")
            self.text(x.start - 6, y(value) + 4, plain_number(value), "tick", "end")
        for value in x.ticks(x_ticks):
            self.text(x(value), y.start + 17, plain_number(value), "tick", "middle")
        self.line([(x.start, y.start), (x.end, y.start)], "axis")
        self.text(x.end, y.start + 33, x_label, "axis-label", "end")
        self.text(x.start - 6, y.end - 12, y_label, "axis-label", "start")

    def svg(self) -> Markup:
        head = Markup(
            '<svg class="picture" role="img" aria-labelledby="{id}-title {id}-desc" viewBox="0 0 {width:g} {height:g}" '
            'width="{width:g}" height="{height:g}" xmlns="http://www.w3.org/2000/svg">'
            '<title id="{id}-title">{title}</title><desc id="{id}-desc">{description}</desc>'
        ).format(id=self.id, width=self.width, height=self.height, title=self.title, description=self.description)
        return head + Markup("").join(self.parts) + Markup("</svg>")


@dataclass
class Labels:
    """Places for labels beside points so that none covers another; a label that finds no place is left out."""

    left: float
    right: float
    taken: list[tuple[float, float, float, float]] = field(default_factory=list)
    top: float = -math.inf
    bottom: float = math.inf

    def keep_free(self, x: float, y: float, r: float = 6) -> None:
        self.taken.append((x - r, y - r, x + r, y + r))

    def place(self, x: float, y: float, words: str) -> tuple[float, float, str] | None:
        """Where the label of a point goes: (x, baseline, anchor)."""
        width = len(words) * CHARACTER
        for dx, dy, anchor in (
            (9, 4, "start"), (-9, 4, "end"), (0, -10, "middle"), (0, 19, "middle"),
            (9, -9, "start"), (9, 17, "start"), (-9, -9, "end"), (-9, 17, "end"),
        ):  # fmt: skip
            left = x + dx - {"start": 0, "end": width, "middle": width / 2}[anchor]
            box = (left, y + dy - 11, left + width, y + dy + 3)
            inside = self.left <= box[0] and box[2] <= self.right and self.top <= box[1] and box[3] <= self.bottom
            if inside and not any(_overlap(box, other) for other in self.taken):
                self.taken.append(box)
                return x + dx, y + dy, anchor
        return None


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
