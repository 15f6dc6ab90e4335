"""The leaderboard as a table on a terminal, and each of its rows as a line for a log.

Columns stand in the order of their importance. Where the terminal is narrow they fall away from the right, down to
name, tokens and forward KL; a long name then goes over several lines.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from kvopt.console.tables import has_width, plain_table
from kvopt.documents.leaderboard_file import LeaderboardDocument, LeaderboardRow
from kvopt.documents.part import Estimate
from kvopt.errors import counted
from kvopt.report.choice import recommended, share_kept

RECOMMENDED = " *"
NEVER_LEFT_OUT = 3  # columns: name, tokens, forward KL
NAME_WIDTH = 24  # of the name column before other columns make room for more of it
GAP = 2  # between two columns, and of both edges together


def board_table(board: LeaderboardDocument) -> BoardTable:
    """The leaderboard for a terminal of any width; ``board.complete`` may be false."""
    return BoardTable(board)


def board_lines(board: LeaderboardDocument) -> dict[str, str]:
    """A line for each context, by name, for a log that gets them as they are scored."""
    return {row.name: _line(row, board) for row in board.contexts}


def _line(row: LeaderboardRow, board: LeaderboardDocument) -> str:
    parts = [counted(row.tokens, "token"), f"forward KL {row.kl_forward.mean:.4f}", f"top-1 {row.top1_agreement:.1%}"]
    kept = share_kept(row, board)
    parts += [f"kept {_percent(kept)}"] if kept is not None and row.name != "none" else []
    parts += [f"{name} {_estimate((row.metrics or {}).get(name))}" for name in board.headlines]
    return f"{row.name}: {', '.join(parts)}"


@dataclass
class _Column:
    heading: str
    cells: list[str] = field(default_factory=list)

    @property
    def width(self) -> int:
        return max(map(len, [self.heading, *self.cells]))


class BoardTable:
    """A leaderboard that takes the width it is given."""

    def __init__(self, board: LeaderboardDocument) -> None:
        self.board = board

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.at(options.max_width)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(options.max_width, 40), options.max_width)

    def at(self, width: int) -> Table:
        """The table for a terminal of so many columns."""
        columns = self._columns()
        kept = len(columns)
        while kept > NEVER_LEFT_OUT and _needed(columns[:kept]) > width:
            kept -= 1
        view = plain_table(escape(f"{self.board.name} · {self.board.base}"), self._caption(columns[kept:]))
        name_width = max(8, width - _needed(columns[:kept]) + min(columns[0].width, NAME_WIDTH))
        view.add_column(columns[0].heading, overflow="fold", min_width=min(columns[0].width, name_width))
        for column in columns[1:kept]:
            side = "left" if column.heading == "kind" else "right"
            view.add_column(escape(column.heading), justify=side, no_wrap=True)  # type: ignore[arg-type]
        for cells in zip(*(column.cells for column in columns[:kept]), strict=True):
            view.add_row(*map(escape, cells), style="bold" if cells[0].endswith(RECOMMENDED) else None)
        return view

    def _columns(self) -> list[_Column]:
        """All columns, the most important first."""
        board, chosen = self.board, recommended(self.board)
        rows = board.contexts

        def tilde(row: LeaderboardRow) -> str:
            return " ~" if row.separable_from_best is False else ""

        columns = [
            _Column("context", [row.name + (RECOMMENDED if row.name == chosen else "") for row in rows]),
            _Column("tokens", [str(row.tokens) for row in rows]),
            _Column("forward KL", [f"{row.kl_forward.mean:.4f}{tilde(row)}" for row in rows]),
            _Column("kept %", [_percent(share_kept(row, board)).removesuffix(" %") for row in rows]),
        ]
        columns += [
            _Column(name, [_estimate((row.metrics or {}).get(name)) for row in rows]) for name in board.headlines
        ]
        return [
            *columns,
            _Column("95 % interval", [_interval(row) for row in rows]),
            _Column("top-1", [f"{row.top1_agreement:.1%}" for row in rows]),
            _Column("gold NLL", [f"{row.gold_nll:.4f}" for row in rows]),
            _Column("p95", [f"{row.kl_forward.p95:.3f}" for row in rows]),
            _Column("kind", [row.kind for row in rows]),
        ]

    def _caption(self, left_out: list[_Column]) -> str:
        board, floor = self.board, self.board.noise_floor
        parts = [] if board.complete else ["not complete yet"]
        parts += [f"{counted(board.rows.validation, 'validation row')}; nats per gold token"]
        if board.headlines and board.answered:
            parts.append(f"{', '.join(board.headlines)}: of {counted(board.answered, 'answer')}")
        parts.append(f"noise floor {floor.kl_forward:.1e} ({floor.dtype})")
        if recommended(board) is not None:
            parts.append("* recommended")
        if any(row.separable_from_best is False for row in board.contexts):
            parts.append("~ not separable from the best")
        if left_out:
            parts.append(f"in a wider terminal: {', '.join(column.heading for column in left_out)}")
        return escape("; ".join(parts))


def _needed(columns: list[_Column]) -> int:
    """The width that these take, with a name column no wider than it needs to be."""
    widths = [min(columns[0].width, NAME_WIDTH), *(column.width for column in columns[1:])]
    return sum(widths) + GAP * len(widths)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}".replace("%", " %")


def _interval(row: LeaderboardRow) -> str:
    low_high = row.kl_forward.ci95
    return f"{low_high[0]:.4f}–{low_high[1]:.4f}" if low_high and has_width(low_high) else "–"


def _estimate(value: Estimate | None) -> str:
    return "–" if value is None or value.mean is None else f"{value.mean:.3f}"
