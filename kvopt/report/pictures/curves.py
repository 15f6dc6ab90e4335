"""Learning curves: KL on training batches and on the held-out selection rows by step, and the step that was kept."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from kvopt.documents.context_record import ContextRecord
from kvopt.report.choice import number
from kvopt.report.pictures.drawing import Picture, Scale, log_scale

WIDTH, HEIGHT = 340, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 34, 46


def curve_values(learned: Sequence[ContextRecord]) -> list[float]:
    """All KLs of these curves, for one scale over several pictures."""
    return [v for one in learned for p in one.history for v in (p.train_kl, p.held_out_kl) if v is not None]


def learning_curve(
    learned: ContextRecord, values: Sequence[float], mutation: tuple[str, float] | None, *, id: str
) -> Markup:
    """``values`` fix the KL axis; ``mutation`` is the best mutation's name and KL on the same selection rows."""
    kept = next((p.held_out_kl for p in learned.history if p.step == learned.best_step), None)
    held_out = [(p.step, p.held_out_kl) for p in learned.history]
    train = [(p.step, p.train_kl) for p in learned.history if p.train_kl is not None]
    last = max((p.step for p in learned.history), default=1)
    x = Scale(0, max(last, 1), LEFT, WIDTH - RIGHT)
    y = log_scale([*values, *([mutation[1]] if mutation else [])], HEIGHT - BOTTOM, TOP)
    words = f"Held-out KL goes from {number(held_out[0][1])} to {number(held_out[-1][1])}" if held_out else "No steps"
    kept_words = f"; step {learned.best_step} was kept, at {number(kept)}" if kept is not None else ""
    picture = Picture(id, WIDTH, HEIGHT, f"Learning curve of {learned.name}", f"{words}{kept_words}.")
    picture.axes(x, y, "step", "forward KL", x_ticks=5, y_ticks=5)
    if mutation and mutation[1] > 0:
        picture.line([(x.start, y(mutation[1])), (x.end, y(mutation[1]))], "floor")
        picture.text(x.end, y(mutation[1]) - 5, f"best mutation, {mutation[0]}", "note", "end")
    if len(train) > 1:
        picture.line([(x(s), y(v)) for s, v in train], f"curve train {learned.kind}")
    if len(held_out) > 1:
        picture.line([(x(s), y(v)) for s, v in held_out], f"curve {learned.kind}")
    for step, value in held_out:
        chosen = step == learned.best_step
        title = f"step {step}: held-out KL {number(value)}" + (" (kept)" if chosen else "")
        picture.mark(x(step), y(value), learned.kind, 4.5 if chosen else 2.5, "front-mark" if chosen else "", title)
    return picture.svg()
