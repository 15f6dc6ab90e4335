"""Commands about students: train, export-data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvopt.cli.common import ConfigPath, Json, Out, Sets, open_run, print_json

if TYPE_CHECKING:
    from kvopt.documents.student_record import StudentRecord
    from kvopt.run.run import Run


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
    launch -m kvopt train …` on several processes.
    """
    from kvopt.train.commands import train_students

    run = open_run(config, sets, out)
    records = train_students(run, only or ())
    if records is not None:
        show_students(records, run.directory.path, as_json)


def export_data(
    config: ConfigPath,
    file: Annotated[Path, typer.Option("--out", metavar="FILE", help="The JSONL file to write.")],
    student: Annotated[
        str | None, typer.Option("--student", metavar="NAME", help="The contexts of this student of the config.")
    ] = None,
    context: Annotated[
        list[str] | None,
        typer.Option("--context", help="Instead: original, best-mutations:K, text:FILE, …; may be repeated."),
    ] = None,
    format: Annotated[str, typer.Option("--format", help="prompt-completion or messages.")] = "prompt-completion",
    sets: Sets = None,
    run_folder: Annotated[
        Path | None, typer.Option("--run", metavar="DIR", help="The run directory with mutations (default: runs/NAME).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the training rows under every text context as JSONL, which any SFT trainer reads. Calls no model."""
    from kvopt.export.rows import choices_of, export_rows
    from kvopt.storage.files import write_jsonl

    run = open_run(config, sets, run_folder)
    choices, seed = choices_of(run.inputs, student, context or ())
    rows = list(export_rows(run.inputs, run.directory.path, choices, seed, format))
    write_jsonl(file, rows)
    counts = Counter(row["context_id"] for row in rows)
    if as_json:
        print_json({"file": str(file), "rows": len(rows), "contexts": dict(counts)})
    else:
        parts = ", ".join(f"{name} {count}" for name, count in counts.items())
        print(f"{file}: {len(rows)} rows ({parts})")


def prepared(run: Run) -> Callable[[], list[StudentRecord]]:
    """What trains the run's students once it is open; their contexts are checked now, before other work."""
    if not run.config.students:
        return list
    from kvopt.train.commands import train_chosen
    from kvopt.train.launch import one_process
    from kvopt.train.stages import chosen

    one_process("kvopt run")
    configs = chosen(run.inputs)
    return lambda: train_chosen(run, configs)


def show_students(records: list[StudentRecord], folder: Path, as_json: bool) -> None:
    if as_json:
        print_json({"students": [record.to_json() for record in records]})
        return
    for record in records:
        place = folder / "students" / str(record.name)
        losses = [point.loss for point in record.history if point.loss is not None]
        curve = f"loss {losses[0]:.4f} to {losses[-1]:.4f}" if losses else "no step"
        print(f"{record.name}: {record.steps} steps, {record.tokens} tokens, {curve}, {place}")
