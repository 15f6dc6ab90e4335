"""The command line: one function for each command. ``--json`` prints one document on stdout, and nothing else there.

Exit codes: 0 done, 1 failed, 2 the input is wrong, 130 interrupted (the same command goes on).
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from kvopt.cli import bench as benchmarks
from kvopt.cli import contexts, evaluation, exporting, merging, report, sequence, starting, students
from kvopt.errors import InputError, KvoptError
from kvopt.storage.files import write_error
from kvopt.version import VERSION

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
    with _ctrl_c() as pressed:
        try:
            code = app(prog_name="kvopt", standalone_mode=False)
            if code == INTERRUPTED:  # typer turns Ctrl-C into this exit code
                _interrupted()
        except (KeyboardInterrupt, typer.Abort):
            _interrupted()
        except Exception as error:
            if pressed:  # native code turns the interrupt into an error of its own now and then
                _interrupted()
            _explain(error)
            raise
    sys.exit(code if isinstance(code, int) else 0)


@contextlib.contextmanager
def _ctrl_c() -> Iterator[list[int]]:
    """Remember that Ctrl-C was pressed, and raise KeyboardInterrupt as ever (where it is not ignored)."""
    pressed: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def press(number: int, frame: Any) -> None:
        pressed.append(number)
        raise KeyboardInterrupt

    ours = before is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)


def _explain(error: Exception) -> None:
    """Leave with one line for every error that has one; return from any other."""
    if isinstance(error, KvoptError):
        _fail(str(error), error.exit_code)
    if isinstance(error, BrokenPipeError):
        sys.stderr.close()
        sys.exit(1)
    if isinstance(error, OSError):
        _fail(str(write_error(error, error.filename or "a file")), 1)
    if hasattr(error, "show") and hasattr(error, "exit_code"):  # wrong usage, as typer reports it
        _usage(error)


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
        print(f"kvopt {VERSION}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


__all__ = ["app", "main"]
