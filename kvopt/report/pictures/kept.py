"""How much of the template's effect a context keeps, or how far it is from the template, against its length: the
first screen's chart, small enough for a telephone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from kvopt.documents.leaderboard_file import LeaderboardDocument, LeaderboardRow
from kvopt.report.choice import is_shortened, number, pareto_front, rivals, share_kept, shown_interval
from kvopt.report.pictures.drawing import CHARACTER, Labels, Picture, Scale, log_scale

WIDTH, HEIGHT = 420, 330
LEFT, RIGHT, TOP, BOTTOM = 50, 16, 34, 46
LONGEST = 1.5  # times the template's length: what is longer stands on the right edge


@dataclass(frozen=True)
class Axis:
    """One way to draw a row: its value, the two ends of its interval, and the scale they stand on."""

    scale: Scale
    value: Callable[[LeaderboardRow], float]
    ends: Callable[[LeaderboardRow], tuple[float, float] | None]
    words: Callable[[float], str]
    label: str


def kept_picture(board: LeaderboardDocument, *, advised: str | None, id: str = "kept") -> Markup | None:
    """Share kept (1 − KL / KL of no context) by tokens; None where the board has no "no context" to compare with. What
    is further from the template than no context stands on the lower edge.
    """
    rows = rivals(board)
    kept = {row.name: share for row in rows if (share := share_kept(row, board)) is not None}
    if not rows or len(kept) < len(rows):
        return None
    bare = next(row.kl_forward.mean for row in board.contexts if row.name == "none")
    comparable = [share for share in kept.values() if share >= 0] or [0.0]
    low = max(0.0, math.floor(min(comparable) * 10 - 0.5) / 10)

    def ends(row: LeaderboardRow) -> tuple[float, float] | None:
        interval = shown_interval(row.kl_forward.ci95)
        return (100 * (1 - interval[1] / bare), 100 * (1 - interval[0] / bare)) if interval else None

    axis = Axis(
        Scale(100 * min(low, 0.9), 100, HEIGHT - BOTTOM, TOP),
        lambda row: 100 * kept[row.name],
        ends,
        lambda value: f"{value:.1f} % kept",
        "kept: % of the template's effect",
    )
    return _drawn(board, rows, axis, advised, id, "Share of the template's effect that is kept, by length")


def distance_picture(board: LeaderboardDocument, *, advised: str | None, id: str = "distance") -> Markup | None:
    """Forward KL on a log scale by tokens, from the noise floor up to "no context"; None without contexts."""
    rows = rivals(board)
    if not rows:
        return None
    bare = next((row.kl_forward.mean for row in board.contexts if row.name == "none"), None)
    floor = board.noise_floor.kl_forward
    values = [max(row.kl_forward.mean, floor) for row in rows]
    top = max(bare, min(values)) if bare is not None and bare > 0 else max(values)
    scale = log_scale([min(value, top) for value in values], HEIGHT - BOTTOM, TOP)
    axis = Axis(
        scale,
        lambda row: row.kl_forward.mean,
        lambda row: shown_interval(row.kl_forward.ci95),
        lambda value: f"KL {number(value)}",
        "forward KL, log scale",
    )
    return _drawn(board, rows, axis, advised, id, "Forward KL by length")


def _drawn(
    board: LeaderboardDocument, rows: Sequence[LeaderboardRow], axis: Axis, advised: str | None, id: str, title: str
) -> Markup:
    edge = LONGEST * max(board.template_tokens, 1)
    longest = min(max([row.tokens for row in rows] + [board.template_tokens]), edge)
    x, y = Scale(0, longest * 1.08, LEFT, WIDTH - RIGHT), axis.scale
    front = {row.name for row in pareto_front(rows)}
    words = "; ".join(f"{row.name}: {row.tokens} tokens, {axis.words(axis.value(row))}" for row in rows[:20])
    picture = Picture(id, WIDTH, HEIGHT, title, f"{words}.")
    picture.axes(x, y, "length in tokens", axis.label, x_ticks=5, y_ticks=6)
    labels = Labels(LEFT + 2, WIDTH - 4, top=2, bottom=HEIGHT - BOTTOM - 2)
    labels.taken.append((0, y.end - 24, LEFT + len(axis.label) * CHARACTER, y.end - 6))
    if board.template_tokens <= longest:
        at = x(board.template_tokens)
        picture.line([(at, y.start), (at, y.end)], "floor")
        picture.text(at - 4, y.start - 6, "template's length", "note", "end")
        labels.taken.append((at - 108, y.start - 18, at, y.start))
    for row in rows:
        labels.keep_free(x(row.tokens), y(axis.value(row)))
    for kind in ("text", "soft", "kv"):
        alike = [row for row in rows if row.kind == kind and (kind != "text" or is_shortened(row))]
        corners = [
            (x(row.tokens), y(axis.value(row))) for row in pareto_front(alike) if y.low <= axis.value(row) <= y.high
        ]
        if len(corners) > 1:
            picture.line(corners, f"front-line {kind}")
    for row in rows:
        _point(picture, x, axis, row, row.name in front, longest)
    for row in sorted(rows, key=lambda row: (row.name != advised, row.name not in front)):
        if place := labels.place(x(row.tokens), y(axis.value(row)), row.name):
            picture.text(place[0], place[1], row.name, "label", place[2])
    return picture.svg()


def _point(picture: Picture, x: Scale, axis: Axis, row: LeaderboardRow, on_front: bool, longest: float) -> None:
    """A mark with its interval; hollow on the edge of the picture where its true place is outside."""
    y, value, ends = axis.scale, axis.value(row), axis.ends(row)
    outside = not y.low <= value <= y.high or row.tokens > longest
    if ends and not outside:
        picture.line([(x(row.tokens), y(ends[0])), (x(row.tokens), y(ends[1]))], f"whisker {row.kind}")
    title = f"{row.name}: {row.kind}, {row.tokens} tokens, {axis.words(value)}" + (" (outside)" if outside else "")
    style = "hollow" if outside else "front-mark" if on_front else ""
    picture.mark(x(row.tokens), y(value), row.kind, 5.5 if on_front else 4.5, style, title)
