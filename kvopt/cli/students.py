"""Commands about students: train, export-data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvopt.cli.common import ConfigPath, Json, Out, Sets, next_command, open_run, print_json
from kvopt.errors import counted

if TYPE_CHECKING:
    from kvopt.documents.student_record import StudentRecord
    from kvopt.run.run import Run


def train(
    config: ConfigPath,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="NAME", help="Train only this student; may be repeated.")
    ] = None,
    sets: Sets = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Train the students of the config under its contexts.

    After an interruption, give the same command again to continue. To train in several processes, start it with
    accelerate launch -m kvopt train, or with torchrun.
    """
    run = open_run(config, sets, out)
    from kvopt.train.commands import train_students

    records = train_students(run, only or ())
    show_students(records, run.directory.path, as_json)
    if not as_json:
        next_command("evaluate", config, sets=sets, out=out)


def export_data(
    config: ConfigPath,
    file: Annotated[Path, typer.Option("--out", metavar="FILE", help="The JSONL file to write.")],
    student: Annotated[
        str | None, typer.Option("--student", metavar="NAME", help="Take the contexts of this student of the config.")
    ] = None,
    context: Annotated[
        list[str] | None,
        typer.Option("--context", help="Or name them: original, best-mutations:K, text:FILE, …; may be repeated."),
    ] = None,
    format: Annotated[str, typer.Option("--format", help="prompt-completion or messages.")] = "prompt-completion",
    sets: Sets = None,
    run_folder: Annotated[
        Path | None,
        typer.Option(
            "--run",
            metavar="DIR",
            help="The run directory with mutations (default: runs/NAME).",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the training rows under each text context as JSONL, for any trainer. No model is loaded."""
    run = open_run(config, sets, run_folder)
    from kvopt.export.training_rows import choices_of, export_rows
    from kvopt.storage.files import write_jsonl

    choices, seed = choices_of(run.inputs, student, context or ())
    rows = list(export_rows(run.inputs, run.directory.path, choices, seed, format))
    write_jsonl(file, rows)
    counts = Counter(row["context_id"] for row in rows)
    if as_json:
        print_json({"file": str(file), "rows": len(rows), "contexts": dict(counts)})
    else:
        parts = ", ".join(f"{name} {count}" for name, count in counts.items())
        print(f"{file}: {counted(len(rows), 'row')} ({parts})")


def prepared(run: Run) -> Callable[[], list[StudentRecord]]:
    """What trains the run's students once it is open; their contexts are checked now, before other work."""
    from kvopt.train.commands import set_aside_others, train_chosen
    from kvopt.train.training import chosen

    configs = chosen(run.inputs)

    def train() -> list[StudentRecord]:
        records = train_chosen(run, configs) if configs else []
        set_aside_others(run)
        return records

    return train


def show_students(records: list[StudentRecord], folder: Path, as_json: bool) -> None:
    if as_json:
        print_json({"students": [record.to_json() for record in records]})
        return
    for record in records:
        place = folder / "students" / str(record.name)
        size = f"{counted(record.steps or 0, 'step')}, {counted(record.tokens or 0, 'token')}"
        measured = [point.gold_nll for point in record.held_out]
        curve = f", held-out NLL {measured[0]:.4f} to {measured[-1]:.4f}" if measured else ""
        print(f"{record.name}: {size}{curve}, {place}")
