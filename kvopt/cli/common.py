"""What every command shares: options, the run of a config, one JSON document on stdout, lines on stderr."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvopt.base.launch import LAUNCH

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvopt.documents.leaderboard_file import LeaderboardDocument
    from kvopt.documents.student_record import StudentRecord
    from kvopt.run.run import Run
    from kvopt.train.workers import Workers

ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG.yaml", help="The config file; kvopt init writes one to start with.")
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=c", help="Change one value of the config; may be repeated.")
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run directory (default: runs/NAME).")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else there.")]


Jobs = Annotated[
    int | None,
    typer.Option(
        "--jobs",
        metavar="N",
        min=1,
        help="Train students in N worker processes, each on a GPU of its own where there are some.",
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Train students in the workers of a Ray cluster, which see the same files (auto: that of this machine).",
    ),
]


def workers_of(jobs: int | None, ray: str | None) -> Workers | None:
    """The worker processes that ``--jobs`` and ``--ray`` ask for; None where they do not. Raises InputError."""
    if jobs is None and ray is None:
        return None
    from kvopt.train.workers import Workers

    return Workers(jobs or -1, ray)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def open_run(config: Path, sets: list[str] | None, out: Path | None) -> Run:
    """The run of a config; the config is checked before torch is loaded, so a typing error is told at once.

    In all processes of a launch but the first, this is where they work until the first has done the command, and exit.
    """
    from kvopt.config.document import load_config

    settings, base_dir = load_config(config, sets or ())
    LAUNCH.start(settings.model.device, shares=settings.model.shard is not None)
    from kvopt.run.run import Run

    folder = out or Path("runs") / settings.name
    run = Run(settings, base_dir, folder, say=say if LAUNCH.is_first else _nothing)
    if not LAUNCH.is_first:
        run.follow()
    return run


def _nothing(line: str) -> None:
    """The first process of a launch speaks for all."""


def print_json(value: Any) -> None:
    unicode = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
    print(json.dumps(value, indent=2, ensure_ascii=not unicode, allow_nan=False))


def next_command(*words: object, sets: Sequence[str] | None = None, out: Path | None = None) -> None:
    """Say what to type next, as the last line of a command; ``sets`` and ``out`` are options that it was given."""
    options = [word for change in sets or () for word in ("--set", change)]
    options += ["--out", str(out)] if out is not None else []
    sys.stdout.flush()
    say("next: " + shlex.join(["kvopt", *map(str, words), *options]))


def next_export(folder: Path, name: str, kind: str) -> None:
    """Say how to take a context of a run along."""
    next_command("export", f"{folder}#{name}", "--to", "text" if kind == "text" else "peft")


def next_of_board(board: LeaderboardDocument, folder: Path) -> None:
    """Say how to take the recommended context of a run along, or where there is none, how to look at the run."""
    from kvopt.report.choice import recommended

    name = recommended(board)
    row = next((row for row in board.contexts if row.name == name), None)
    if row is None:
        next_command("compare", folder)
    else:
        next_export(folder, row.name, row.kind)


def show_board(board: LeaderboardDocument, folder: Path, as_json: bool, students: Sequence[StudentRecord] = ()) -> None:
    """The leaderboard as a table, or as one document with the records of students that were trained with it."""
    from kvopt.console.tables import console
    from kvopt.report.board_table import board_table

    if as_json:
        records = [record.to_json() for record in students]
        print_json(board.to_json() | ({"students": records} if records else {}))
    else:
        console().print(board_table(board))
        print(f"run directory: {folder}")
