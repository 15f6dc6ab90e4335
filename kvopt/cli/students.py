"""Commands about students: train, export-data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvopt.cli.common import ConfigPath, Json, Out, Sets, next_command, open_run, print_json, say
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
    format: Annotated[
        str, typer.Option("--format", help="tokens, text, messages, prompt-completion, sharegpt or alpaca.")
    ] = "prompt-completion",
    verify: Annotated[
        str | None,
        typer.Option(metavar="trl", help="Also say where TRL would train on other tokens or labels than kvopt train."),
    ] = None,
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
    """Write the training rows under each text context as JSONL, for any trainer, and beside it how to train on it with
    TRL, axolotl, LLaMA-Factory and unsloth. No model is loaded.

    Learned contexts of a student have no rows; they are written as adapter folders beside the file.
    """
    from kvopt.export.trl_check import SHOWN, check_trl

    if verify is not None:
        check_trl(verify)
    run = open_run(config, sets, run_folder)
    from kvopt.export.data_folder import write_data

    written = write_data(
        run.inputs, run.directory.path, file, student, context or (), format, verify=verify is not None
    )
    if as_json:
        print_json(written.to_json())
        return
    counts = Counter(row["context_id"] for row in written.rows)
    parts = ", ".join(f"{name} {count}" for name, count in counts.items())
    print(f"{file}: {counted(len(written.rows), 'row')} ({parts})")
    for folder in written.adapters:
        print(f"{folder}: a learned context, which has no rows, as an adapter")
    if (found := written.differences) is not None:
        differ = f"{len(found)} of {counted(len(written.rows), 'row')}"
        print(
            f"TRL: {differ} with other tokens or labels than kvopt train"
            if found
            else "TRL: the same tokens and labels"
        )
        for difference in found[:SHOWN]:
            print(f"  {difference}")
        if len(found) > SHOWN:
            print(f"  … and {len(found) - SHOWN} more (--json has all)")
    if format == "messages":
        say("note: TRL trains on whole messages, the prompt too, unless SFTConfig(assistant_only_loss=True)")
    print(f"{written.guide}: how to train on it")


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
