"""The one style of tables, on a terminal or in a file."""

from __future__ import annotations

import sys

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

WIDTH_OF_FILES = 120
"""Columns of a table that goes to a file or a pipe."""

DUST = 1e-9
"""An interval narrower than this is rounding of the arithmetic, not uncertainty about a value."""


def has_width(interval: tuple[float, float]) -> bool:
    """Whether an interval (low, high) says anything: False for one that rounding alone makes."""
    return interval[1] - interval[0] > DUST


def console() -> Console:
    """Standard output for tables: as wide as the terminal, or :data:`WIDTH_OF_FILES` where there is none."""
    return Console(width=None if sys.stdout.isatty() else WIDTH_OF_FILES, highlight=False)


def plain_table(title: str | None = None, caption: str | None = None) -> Table:
    """An empty table: a rule under its headings, title and caption on the left; both are read as rich markup."""
    return Table(
        title=title,
        caption=caption,
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
        collapse_padding=True,
        title_justify="left",
        caption_justify="left",
    )
