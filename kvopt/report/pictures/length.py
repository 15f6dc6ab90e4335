"""Forward KL against context length: every kind on one picture, intervals, the Pareto front, the noise floor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from kvopt.documents.choosing import BUILT_IN
from kvopt.documents.leaderboard_file import LeaderboardRow
from kvopt.report.choice import number, pareto_front, shown_interval
from kvopt.report.pictures.drawing import Labels, Picture, Scale, log_scale

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 34, 48


@dataclass(frozen=True)
class Chosen:
    """A mutation that has a selection score only."""

    name: str
    tokens: int
    kl: float


def length_picture(
    rows: Sequence[tuple[str, LeaderboardRow]],
    others: Sequence[Chosen],
    floor: float | None,
    template_tokens: int | None,
    *,
    id: str = "length",
) -> Markup:
    """``rows`` are contexts with their labels, the original left out; ``others`` are drawn hollow; ``floor`` is the
    noise floor in nats; ``template_tokens`` the original's length.
    """
    values = [row.kl_forward.mean for _, row in rows] + [c.kl for c in others]
    values += [edge for _, row in rows for edge in row.kl_forward.ci95 or ()] + ([floor] if floor else [])
    longest = max([row.tokens for _, row in rows] + [c.tokens for c in others] + [template_tokens or 1])
    x = Scale(0, longest * 1.06, LEFT, WIDTH - RIGHT)
    y = log_scale(values, HEIGHT - BOTTOM, TOP)
    front = pareto_front([row for _, row in rows if row.name not in BUILT_IN])
    picture = Picture(id, WIDTH, HEIGHT, "Forward KL against context length", _in_words(rows, front, floor))
    picture.axes(x, y, "context length in tokens", "forward KL, nats per gold token (log scale)")
    labels = Labels(LEFT, WIDTH - 4)
    if floor and floor > 0:
        picture.line([(x.start, y(floor)), (x.end, y(floor))], "floor")
        picture.text(x.start + 6, y(floor) - 5, "noise floor", "note")
        labels.taken.append((x.start, y(floor) - 16, x.start + 80, y(floor) + 1))
    if template_tokens:
        picture.line([(x(template_tokens), y.start), (x(template_tokens), y.end)], "floor")
        picture.text(x(template_tokens) - 5, y.end + 8, "template", "note", "end")
        labels.taken.append((x(template_tokens) - 62, y.end - 4, x(template_tokens), y.end + 12))
    if len(front) > 1:
        picture.line(_steps(front, x, y), "front")
    for chosen in others:
        picture.mark(
            x(chosen.tokens), y(chosen.kl), "text", 3, "hollow", f"{chosen.name}: selection KL {number(chosen.kl)}"
        )
    for label, row in rows:
        _point(picture, x, y, label, row, any(row is other for other in front))
        labels.keep_free(x(row.tokens), y(row.kl_forward.mean))
    for label, row in sorted(rows, key=lambda pair: not any(pair[1] is other for other in front)):
        if place := labels.place(x(row.tokens), y(row.kl_forward.mean), label):
            picture.text(place[0], place[1], label, "label", place[2])
    return picture.svg()


def _point(picture: Picture, x: Scale, y: Scale, label: str, row: LeaderboardRow, on_front: bool) -> None:
    kl = row.kl_forward
    ends = shown_interval(kl.ci95)
    if ends:
        picture.line([(x(row.tokens), y(ends[0])), (x(row.tokens), y(ends[1]))], f"whisker {row.kind}")
    interval = f" ({number(ends[0])}–{number(ends[1])})" if ends else ""
    title = f"{label}: {row.kind}, {row.tokens} tokens, KL {number(kl.mean)}{interval}"
    picture.mark(x(row.tokens), y(kl.mean), row.kind, 5.5 if on_front else 4, "front-mark" if on_front else "", title)


def _steps(front: Sequence[LeaderboardRow], x: Scale, y: Scale) -> list[tuple[float, float]]:
    """The front as stairs: nothing measured lies below and left of it."""
    points = [(x(front[0].tokens), y(front[0].kl_forward.mean))]
    for row in front[1:]:
        points += [(x(row.tokens), points[-1][1]), (x(row.tokens), y(row.kl_forward.mean))]
    return points


def _in_words(rows: Sequence[tuple[str, LeaderboardRow]], front: Sequence[LeaderboardRow], floor: float | None) -> str:
    on = [label for label, row in rows if any(row is other for other in front)]
    noise = f" The noise floor is {number(floor)}." if floor else ""
    return f"{len(rows)} contexts by length and distance. On the Pareto front: {', '.join(on) or 'none'}.{noise}"
