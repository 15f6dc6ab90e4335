"""The leaderboard as a table on a terminal."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from kvopt.console.tables import plain_table
from kvopt.documents.leaderboard_file import LeaderboardDocument


def board_table(board: LeaderboardDocument) -> Table:
    """The leaderboard for a terminal."""
    floor = board.noise_floor
    caption = (
        f"{board.rows.validation} validation rows; nats per gold token;"
        f" noise floor {floor.kl_forward:.1e} ({floor.dtype})"
    )
    if any(row.separable_from_best is False for row in board.contexts):
        caption += "; ~ not separable from the best"
    view = plain_table(escape(f"{board.name} · {board.base}"), caption)
    view.add_column("context", overflow="fold", min_width=8)
    view.add_column("kind", no_wrap=True)
    for heading in ("tokens", "forward KL", "95 % interval", "p95", "gold NLL", "top-1"):
        view.add_column(heading, justify="right", no_wrap=True)
    for row in board.contexts:
        kl = row.kl_forward
        interval = f"{kl.ci95[0]:.4f}–{kl.ci95[1]:.4f}" if kl.ci95 else "–"
        mark = " ~" if row.separable_from_best is False else ""
        view.add_row(
            escape(row.name), row.kind, str(row.tokens), f"{kl.mean:.4f}{mark}", interval, f"{kl.p95:.3f}",
            f"{row.gold_nll:.4f}", f"{row.top1_agreement:.1%}",
        )  # fmt: skip
    return view
