"""Forward KL against gold NLL, one point a context: what the rank agreement is about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from kvopt.report.choice import number
from kvopt.report.pictures.drawing import Picture, Scale, log_scale

WIDTH, HEIGHT = 340, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 16, 34, 46


def rank_picture(agreement: Mapping[str, Any], kinds: Mapping[str, str], *, id: str) -> Markup:
    """``agreement`` is one of ``rank_agreements``; ``kinds`` gives each context's kind."""
    points = agreement["points"]
    losses = [p["gold_nll"] for p in points]
    room = (max(losses) - min(losses)) * 0.08 or 0.01
    x = Scale(min(losses) - room, max(losses) + room, LEFT, WIDTH - RIGHT)
    y = log_scale([p["kl_forward"] for p in points], HEIGHT - BOTTOM, TOP)
    rho = agreement["spearman"]
    words = "not defined" if rho is None else f"{rho:.2f}"
    title = f"Forward KL against pre-update loss: {agreement['over']}, {agreement['split']} rows"
    picture = Picture(id, WIDTH, HEIGHT, title, f"{len(points)} points; Spearman rank correlation {words}.")
    picture.axes(x, y, "gold NLL, nats per token", "forward KL", x_ticks=4, y_ticks=5)
    for point in points:
        tip = f"{point['name']}: KL {number(point['kl_forward'])}, gold NLL {point['gold_nll']:.4f}"
        kind = kinds.get(point["name"], "text")
        picture.mark(x(point["gold_nll"]), y(point["kl_forward"]), kind, 3.5, title=tip)
    return picture.svg()
