"""What a person sees of a run that is going on: the leaderboard as it grows, and its page on disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvopt.documents.leaderboard_file import LeaderboardDocument

SECONDS_BETWEEN_PAGES = 1.0


@contextmanager
def growing_board(folder: Path) -> Iterator[Callable[[LeaderboardDocument], None]]:
    """A function that shows the leaderboard after each context, and renews ``report.html`` in ``folder``.

    Rows are shown from "no context" on, which says how much there is to keep. Contexts that are there already come
    faster than a page is written: those have no page of their own.
    """
    from kvopt.console.live import LiveTable
    from kvopt.report import write_report
    from kvopt.report.board_table import board_lines, board_table

    written = 0.0
    with LiveTable() as table:

        def show(board: LeaderboardDocument) -> None:
            nonlocal written
            if any(row.name == "none" for row in board.contexts):
                table.show(board_table(board), board_lines(board))
            if time.monotonic() - written >= SECONDS_BETWEEN_PAGES:
                write_report([folder], folder, ("html",))
                written = time.monotonic()

        yield show
