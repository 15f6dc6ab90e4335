"""The command compare, and the page that run and demo leave."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvopt.cli.common import Json, print_json, say

SEVERAL = Path("comparison")


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="One or more run directories.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Where to write (default: the run; for several, comparison).",
        ),
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option("--format", metavar="LIST", help="Some of html,json,csv,markdown (default: all)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare the contexts of one or more runs: a table, and one offline page that says which to take and why.

    No model is loaded. With --json, files are written only if --out or --format asks for them.
    """
    from kvopt.report import report_of, write_report

    chosen = chosen_formats(formats)
    folder = out or (runs[0] if len(runs) == 1 else SEVERAL)
    if as_json and out is None and formats is None:
        print_json(report_of(runs)[0])
        return
    report, written = write_report(runs, folder, chosen)
    if as_json:
        print_json(report)
    else:
        show_report(report, runs)
    for path in written:
        say(f"wrote {path}")


def chosen_formats(formats: str | None) -> tuple[str, ...]:
    """The formats of a ``--format`` list. Raises InputError for one that does not exist."""
    from kvopt.errors import InputError
    from kvopt.report import FORMATS

    if formats is None:
        return FORMATS
    names = tuple(dict.fromkeys(name.strip() for name in formats.split(",") if name.strip()))
    unknown = [name for name in names if name not in FORMATS]
    if unknown or not names:
        what = f"unknown format {unknown[0]!r}" if unknown else "no format is named"
        raise InputError(what, where="--format", fix=f"a list of {', '.join(FORMATS)}")
    return names


def show_report(report: dict[str, Any], folders: list[Path]) -> None:
    """The table of one run or several, what to take, and whether their numbers can be compared."""
    from kvopt.console.tables import console
    from kvopt.report.tables import terminal_table

    out = console()
    out.print(terminal_table(report))
    several = len(report["runs"]) > 1
    for run in report["runs"]:
        start = f"{run['label']}: " if several else ""
        out.print(start + " ".join(run["advice"]["sentences"]), markup=False)
    for sentence in report.get("changes", {}).get("why", ()):
        out.print(sentence, markup=False)


def leave_page(folder: Path) -> None:
    """Write a finished run's ``report.html`` and say where it is."""
    from kvopt.report import write_report

    _, (path,) = write_report([folder], folder, ("html",))
    say(f"report: {path}")


def renew_page(folder: Path) -> None:
    """As :func:`leave_page` where the run has come to its end, after students or a study were added to it."""
    if (folder / "leaderboard.json").is_file():
        leave_page(folder)
