"""The command line: a thin face over the run. ``--json`` prints one document on stdout; everything else goes to stderr.

Exit codes: 0 done, 1 failed, 2 the input is wrong, 130 interrupted (the same command goes on).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

import kvopt
from kvopt.cli import bench as benchmarks
from kvopt.cli import contexts, evaluation, exporting, merging, report, sequence, starting, students
from kvopt.errors import InputError, KvoptError
from kvopt.files import write_error

INTERRUPTED = 130

app = typer.Typer(
    name="kvopt",
    help="Find contexts that make a language model behave as a prompt template makes it behave.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
COMMANDS: dict[str, Callable[..., Any]] = {
    "demo": starting.demo,
    "init": starting.init,
    "validate": starting.validate,
    "run": contexts.run_all,
    "mutate": contexts.mutate,
    "score": contexts.score,
    "optimize": contexts.optimize,
    "train": students.train,
    "export-data": students.export_data,
    "evaluate": evaluation.evaluate,
    "study": evaluation.study,
    "sequence": sequence.sequence,
    "compare": report.compare,
    "export": exporting.export,
    "inspect": contexts.inspect,
    "lines": merging.lines,
    "soup": merging.soup,
    "move": exporting.move,
    "compose": exporting.compose,
    "truncate": exporting.truncate,
    "config": starting.show_config,
}
for name, command in COMMANDS.items():
    app.command(name)(command)

bench = typer.Typer(help="Benchmarks that print ratios from one run.", no_args_is_help=True)
app.add_typer(bench, name="bench")
BENCHMARKS: dict[str, Callable[..., Any]] = {
    "kl": benchmarks.bench_kl,
    "step": benchmarks.bench_step,
    "score": benchmarks.bench_score,
}
for name, command in BENCHMARKS.items():
    bench.command(name)(command)


def main() -> None:
    """Entry point of the ``kvopt`` command."""
    try:
        code = app(prog_name="kvopt", standalone_mode=False)
        if code == INTERRUPTED:  # typer turns Ctrl-C into this exit code
            _interrupted()
    except KvoptError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _interrupted()
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except typer.Abort:
        _interrupted()
    except OSError as error:
        _fail(str(write_error(error, error.filename or "a file")), 1)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # wrong usage, as typer reports it
            _usage(error)
        raise
    sys.exit(code if isinstance(code, int) else 0)


def _usage(error: Any) -> None:
    """One line for a wrong command line: what, in which command, and where its options are listed."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "kvopt"
    what = error.format_message().rstrip(".")
    _fail(str(InputError(what, where=command, mend=f"{command} --help lists what it takes")), error.exit_code)


def _fail(message: str, code: int) -> None:
    print("error: " + " ".join(line.strip() for line in message.splitlines()), file=sys.stderr)
    sys.exit(code)


def _interrupted() -> None:
    print("interrupted; finished work is kept: run the same command again to go on", file=sys.stderr)
    sys.exit(INTERRUPTED)


def _version(value: bool) -> None:
    if value:
        print(f"kvopt {kvopt.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


__all__ = ["app", "main"]
