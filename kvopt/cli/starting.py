"""Commands to start with: demo, init, validate, config."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from kvopt.cli.common import (
    ConfigPath,
    Json,
    Out,
    Sets,
    next_command,
    next_of_board,
    open_run,
    print_json,
    say,
    show_board,
)
from kvopt.cli.growing_board import growing_board
from kvopt.cli.report import leave_page
from kvopt.errors import InputError


def demo(
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="A longer demo with more of everything: it writes docstrings of your Python's library."
        ),
    ] = False,
    fast: Annotated[bool, typer.Option("--fast", hidden=True)] = False,
    sets: Sets = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """See what kvopt does, in two minutes on a CPU: how much of a prompt a few slots keep, and how its answers change.

    The prompt turns reminders into JSON. The model (135M parameters) is downloaded once; the data comes with kvopt.
    """
    source = resources.files("kvopt") / "configs" / ("demo-full.yaml" if full else "demo.yaml")
    with resources.as_file(source) as path:
        run = open_run(path, sets, out)
        with run.opened(), growing_board(run.directory.path) as show:
            board = run.run(show)
    show_board(board, run.directory.path, as_json)
    leave_page(run.directory.path)
    if not as_json:
        next_of_board(board, run.directory.path)


def init(
    folder: Annotated[Path, typer.Argument(help="The folder to write to.")] = Path(),
    infer: Annotated[
        Path | None,
        typer.Option("--infer", metavar="FILE", help="Recover the template from these rendered prompts."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
) -> None:
    """Write a commented config with a little data to start from.

    With --infer, template and data are recovered from prompts that were already rendered.
    """
    from kvopt.cli.starter import write_inferred, write_starter

    written, notes = write_inferred(infer, folder, force) if infer else (write_starter(folder, force), [])
    for path in written:
        say(f"wrote {path}")
    for note in notes:
        say(f"warning: {note}")
    next_command("validate", folder / "kvopt.yaml")


def validate(config: ConfigPath, sets: Sets = None, as_json: Json = False) -> None:
    """Check config, template and data, and show where context and body meet, without loading the weights."""
    from kvopt.config.document import load_config

    settings, base_dir = load_config(config, sets or ())
    from kvopt.run.inputs import read_inputs
    from kvopt.run.validate import check, report_text
    from kvopt.train.early_checks import check_evaluation, check_students

    inputs = read_inputs(settings, base_dir)
    report = check(inputs)
    check_students(inputs)
    check_evaluation(inputs)
    if as_json:
        print_json(report)
        return
    for warning in report["warnings"]:
        say(f"warning: {warning}")
    print(report_text(report))
    next_command("run", config, sets=sets)


def show_config(
    as_reference: Annotated[
        bool, typer.Option("--reference", help="Print every key with its type, default and meaning, as Markdown.")
    ] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of the config file, or of DOCUMENT.")
    ] = False,
    document: Annotated[
        str | None,
        typer.Argument(
            metavar="DOCUMENT",
            help="With --schema, a file that kvopt writes: leaderboard, scores, samples, answers, evaluation, study,"
            " sequence, frontier, shortened, context (kvopt.json), student (kvopt-student.json), export"
            " (kvopt-export.json), manifest or ledger.",
        ),
    ] = None,
) -> None:
    """Print the commented starter config, the reference of all keys, or the JSON schema.

    --schema alone gives the schema of config files, and --schema DOCUMENT that of a file that kvopt writes.
    """
    if document is not None and (as_reference or not schema):
        fix = f"kvopt config --schema {document}"
        raise InputError(f"{document} is a document, of which --schema prints the schema", fix=fix)
    if as_reference:
        from kvopt.config.reference_page import reference

        print(reference(), end="")
    elif document is not None:
        from kvopt.documents.schemas import schema_of

        print_json(schema_of(document))
    elif schema:
        from kvopt.config.document import Config

        print_json(Config.model_json_schema())
    else:
        print((resources.files("kvopt") / "configs" / "template.yaml").read_text("utf-8"))
