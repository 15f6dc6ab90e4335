"""Commands about students: train, export-data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvopt.cli.common import ConfigPath, Json, Out, Sets, open_run, print_json

if TYPE_CHECKING:
    from kvopt.run import Run


def train(
    config: ConfigPath,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="NAME", help="Train this student only; may be repeated.")
    ] = None,
    sets: Sets = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Train the config's students on its contexts. Run it again to go on after an interruption; under `accelerate
    launch -m kvopt.cli train …` on several processes.
    """
    from kvopt.train.stages import train_students

    run = open_run(config, sets, out)
    records = train_students(run, only or ())
    show_students(records, run.directory.path, as_json)


def prepared(run: Run) -> Callable[[], list[dict[str, Any]]]:
    """What trains the run's students once it is open; their contexts are checked now, before other work."""
    if not run.config.students:
        return list
    from kvopt.train.stages import chosen, students

    configs = chosen(run)
    return lambda: students(run, configs)


def show_students(records: list[dict[str, Any]], folder: Path, as_json: bool) -> None:
    if as_json:
        print_json({"students": records})
        return
    for record in records:
        place = folder / "students" / record["name"]
        losses = [point["loss"] for point in record["history"]]
        curve = f"loss {losses[0]:.4f} to {losses[-1]:.4f}" if losses else "no step"
        print(f"{record['name']}: {record['steps']} steps, {record['tokens']} tokens, {curve}, {place}")
