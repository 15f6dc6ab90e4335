"""Reports of runs: the leaderboard as JSON, CSV, Markdown, one offline HTML page, and a terminal table.

Reading, comparing and showing need neither torch nor a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvopt.report.reading import RunFiles

FORMATS = ("html", "json", "csv", "markdown")


def report_of(folders: Sequence[Path]) -> tuple[dict[str, Any], list[RunFiles]]:
    """The document of ``report.json`` for run directories, and what was read for it.

    Raises InputError for a folder that is no finished run, or holds damaged files.
    """
    from kvopt.report.contents import document
    from kvopt.report.reading import read_runs

    runs = read_runs([Path(folder) for folder in folders])
    return document(runs), runs


def write_report(
    folders: Sequence[Path], out: Path, formats: Sequence[str] = FORMATS
) -> tuple[dict[str, Any], list[Path]]:
    """Write ``report.html``, ``.json``, ``.csv`` and ``.md`` (those asked for) of one run or several into ``out``.

    Returns the document of ``report.json`` and the files written. Raises InputError as :func:`report_of` does.
    """
    report, runs = report_of(folders)
    return report, write_files(report, runs, Path(out), formats)


def write_files(
    report: dict[str, Any], runs: Sequence[RunFiles], out: Path, formats: Sequence[str] = FORMATS
) -> list[Path]:
    """As :func:`write_report`, of what :func:`report_of` gave. Where ``out`` ends in ``.html``, that file is the page,
    and the only one written.
    """
    from kvopt.report.page import render
    from kvopt.report.tables import to_csv, to_markdown
    from kvopt.storage.files import write_json, write_text

    if out.suffix.lower() == ".html":
        write_text(out, render(report, runs))
        return [out]
    written = []
    for name in formats:
        path = out / f"report.{'md' if name == 'markdown' else name}"
        if name == "html":
            write_text(path, render(report, runs))
        elif name == "json":
            write_json(path, report)
        else:
            write_text(path, to_csv(report) if name == "csv" else to_markdown(report))
        written.append(path)
    return written
