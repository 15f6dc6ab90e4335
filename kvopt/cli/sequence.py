"""The command about sequences of tasks: sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvopt.cli.common import Jobs, Json, Out, Ray, Sets, print_json, say, workers_of


def sequence(
    config: Annotated[
        Path,
        typer.Argument(metavar="SEQUENCE.yaml", help="Tasks (kvopt configs) in order, and students to compare."),
    ],
    jobs: Jobs = None,
    ray: Ray = None,
    sets: Sets = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Train students on one task after another, and measure every task after every stage.

    Reports the scores R of each stage, their average at the end (AP), and backward and forward transfer (BWT, FWT).
    After an interruption, give the same command again to continue, with any --jobs.
    """
    from kvopt.cli.evaluation import show
    from kvopt.config.sequence import load_sequence

    settings, base_dir = load_sequence(config, sets or ())
    from kvopt.train.sequence.sequence import by_workers, conduct
    from kvopt.train.sequence.tables import tables
    from kvopt.train.sequence.tasks import load_tasks

    folder = out or Path("runs") / settings.name
    workers, tasks = workers_of(jobs, ray), load_tasks(settings, base_dir, folder, say=say)
    progress = tasks[0].run.at.progress
    beforehand = by_workers(settings, base_dir, folder, workers, progress) if workers else None
    document = conduct(settings, tasks, folder, beforehand)
    if as_json:
        print_json(document.to_json())
        return
    show(tables(document))
    print(folder / "sequence.json")
