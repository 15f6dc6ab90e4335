"""The command compare, and the page that run and demo leave."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvopt.cli.common import Json, print_json, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvopt.report.gate import Gate
    from kvopt.report.reading import RunFiles

SEVERAL = Path("comparison")


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="One or more run directories.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="PATH",
            help="Where to write: a folder, or one page NAME.html (default: the run; for several, comparison).",
        ),
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option("--format", metavar="LIST", help="Some of html,json,csv,markdown (default: all)."),
    ] = None,
    fail_above: Annotated[
        float | None,
        typer.Option("--fail-above", metavar="KL", help="Exit with 1 where the context's forward KL is above this."),
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", metavar="NAME", help="The metric that --fail-below is about.")
    ] = None,
    fail_below: Annotated[
        float | None,
        typer.Option("--fail-below", metavar="VALUE", help="Exit with 1 where the context's --metric is below this."),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option("--context", metavar="NAME", help="Which context is checked (default: the recommended one)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare the contexts of one or more runs: a table, and one offline page that says which to take and why.

    No model is loaded. With --json, files are written only if --out or --format asks for them.

    With --fail-above or --fail-below it is a gate for CI: it prints one line, exits with 1 where a limit is broken, and
    writes files only if --out or --format asks for them.
    """
    from kvopt.report import report_of, write_files
    from kvopt.report.gate import Gate

    gate = Gate(fail_above, metric, fail_below, context)
    chosen = chosen_formats(formats)
    if out is not None and out.suffix.lower() == ".html" and formats is not None and chosen != ("html",):
        from kvopt.errors import InputError

        raise InputError("is one page and cannot hold other formats", where="--out", fix="give a folder to --out")
    report, files = report_of(runs)
    asked = out is not None or formats is not None
    written: list[Path] = []
    if asked or not (as_json or gate.checks_something):
        written = write_files(report, files, out or (runs[0] if len(runs) == 1 else SEVERAL), chosen)
    if as_json:
        print_json(report)
    if gate.checks_something:
        check(gate, files)
        return
    if not as_json:
        show_report(report)
    for path in written:
        say(f"wrote {path}")


def check(gate: Gate, runs: Sequence[RunFiles]) -> None:
    """One line on standard error, and exit code 1 where a limit is broken."""
    fails, passes = gate.check(runs)
    say(f"failed: {'; '.join(fails)}" if fails else f"passed: {'; '.join(passes)}")
    if fails:
        raise typer.Exit(1)


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


def show_report(report: dict[str, Any]) -> None:
    """The table of one run or several, what to take, and whether their numbers can be compared."""
    from kvopt.console.tables import console
    from kvopt.report.tables import terminal_table

    out = console()
    out.print(terminal_table(report, out.width))
    several = len(report["runs"]) > 1
    for run in report["runs"]:
        start = f"{run['label']}: " if several else ""
        out.print(start + " ".join(run["advice"]["sentences"]), markup=False)
        for line in run["left_out"]:
            out.print(f"{start}not shown: {line}", markup=False)
    for sentence in report.get("changes", {}).get("why", ()):
        out.print(sentence, markup=False)


def leave_page(folder: Path) -> None:
    """Write a finished run's ``report.html`` and say where it is."""
    from kvopt.report import write_report

    report, (path,) = write_report([folder], folder, ("html",))
    for line in report["runs"][0]["left_out"]:
        say(f"warning: not on the page: {line}")
    say(f"report: {path}")


def renew_page(folder: Path) -> None:
    """As :func:`leave_page` where the run has come to its end, after students or a study were added to it."""
    if (folder / "leaderboard.json").is_file():
        leave_page(folder)
