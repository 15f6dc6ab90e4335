"""What the n-th mutation buys: a quantity by number of training mutations, each seed, their mean, and the fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from kvopt.report.pictures.drawing import Picture, Scale

WIDTH, HEIGHT = 340, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 16, 34, 46
STEPS = 48


def growth_picture(
    quantity: str, values: Mapping[int, Sequence[float]], fit: Mapping[str, float] | None, *, id: str
) -> Markup:
    """``values`` are those of each seed by number of mutations n; ``fit`` is a, b, c of a·(n+1)^(−b) + c."""
    points = [(n, value) for n, of_n in values.items() for value in of_n]
    highest = max(values)
    x = Scale(1, highest + 1.5, LEFT, WIDTH - RIGHT, log=True)
    low, high = min(v for _, v in points), max(v for _, v in points)
    room = (high - low) * 0.1 or abs(high) * 0.1 or 0.01
    y = Scale(low - room, high + room, HEIGHT - BOTTOM, TOP)
    means = {n: sum(of_n) / len(of_n) for n, of_n in values.items()}
    words = ", ".join(f"n={n}: {mean:.4g}" for n, mean in means.items())
    picture = Picture(id, WIDTH, HEIGHT, f"{quantity} by number of mutations", f"Means over seeds: {words}.")
    for value in y.ticks(5):
        picture.line([(x.start, y(value)), (x.end, y(value))], "grid")
        picture.text(x.start - 6, y(value) + 4, f"{value:g}", "tick", "end")
    for n in values:
        picture.text(x(n + 1), y.start + 17, str(n), "tick", "middle")
    picture.line([(x.start, y.start), (x.end, y.start)], "axis")
    picture.text(x.end, y.start + 33, "mutations in training", "axis-label", "end")
    picture.text(x.start - 6, y.end - 12, quantity, "axis-label", "start")
    if fit is not None:
        wordings = [(highest + 1) ** (step / STEPS) for step in range(STEPS + 1)]
        picture.line([(x(m), y(fit["a"] * m ** -fit["b"] + fit["c"])) for m in wordings], "curve kv")
    for n, value in points:
        picture.mark(x(n + 1), y(value), "text", 2.5, "hollow", f"n={n}: {value:.4g}")
    for n, mean in means.items():
        picture.mark(x(n + 1), y(mean), "text", 4, title=f"n={n}: mean {mean:.4g}")
    return picture.svg()
