"""A table that grows while work goes on: redrawn in place on a terminal, its new rows as lines in a log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import TracebackType

from rich.console import Console, RenderableType
from rich.live import Live

from kvopt.console.progress import is_terminal, screen


class LiveTable:
    """Use it as a context, and call :meth:`show` whenever there is more to see.

    On a terminal the newest table stands below what is printed meanwhile, beside the bars of
    :class:`kvopt.console.progress.Progress`, and goes when the context ends (print the last one then). Elsewhere every
    row is a line, once, and again when it changes.

    Args:
        say: gets the lines (default: stderr).
        drawn: whether tables are drawn in place (None: on a terminal).
        console: where they are drawn.
    """

    def __init__(
        self,
        say: Callable[[str], None] | None = None,
        drawn: bool | None = None,
        console: Console | None = None,
    ) -> None:
        self._say = say or (lambda line: print(line, file=sys.stderr, flush=True))
        draws = is_terminal() if drawn is None else drawn
        self._live = Live(console=console or screen(), transient=True, auto_refresh=False) if draws else None
        self._said: dict[str, str] = {}

    def __enter__(self) -> LiveTable:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def show(self, table: RenderableType, rows: Mapping[str, str]) -> None:
        """Show a table, of which ``rows`` are the lines by what identifies them (a context's name)."""
        if self._live:
            self._live.update(table, refresh=True)
        for name, line in rows.items():
            if self._said.get(name) != line and not self._live:
                self._say(line)
            self._said[name] = line
