"""The command line: one function for each command. ``--json`` prints one document on stdout, and nothing else there.

Exit codes: 0 done, 1 failed, 2 the input is wrong, 130 interrupted (give the same command again to continue).
"""

from __future__ import annotations

import contextlib
import inspect
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from io import TextIOWrapper
from typing import Annotated, Any

import typer

from kvopt.base.launch import LAUNCH, is_first, one_process
from kvopt.cli import bench as benchmarks
from kvopt.cli import (
    contexts,
    endpoints,
    evaluation,
    exporting,
    merging,
    plans,
    report,
    sequence,
    shortest,
    starting,
    students,
)
from kvopt.errors import InputError, KvoptError
from kvopt.storage.files import write_error
from kvopt.version import VERSION

INTERRUPTED = 130

app = typer.Typer(
    name="kvopt",
    help="Find contexts that make a language model behave as a prompt template makes it behave: other wordings, soft"
    " prompts, KV caches. Compare them, export them, and train models (students) under them."
    "\n\nStart with kvopt demo, or with kvopt init for a template of your own.",
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
PANELS: dict[str, dict[str, Callable[..., Any]]] = {
    "Start": {
        "demo": starting.demo,
        "init": starting.init,
        "validate": starting.validate,
        "plan": plans.plan,
        "check-endpoint": endpoints.check_endpoint,
        "config": starting.show_config,
    },
    "Contexts: find, compare, export": {
        "compact": shortest.compact,
        "run": contexts.run_all,
        "mutate": contexts.mutate,
        "optimize": contexts.optimize,
        "score": contexts.score,
        "shorten": shortest.shorten,
        "frontier": shortest.frontier,
        "compare": report.compare,
        "inspect": contexts.inspect,
        "clean": contexts.clean,
        "export": exporting.export,
        "move": exporting.move,
        "compose": exporting.compose,
        "truncate": exporting.truncate,
    },
    "Students: train, measure": {
        "train": students.train,
        "evaluate": evaluation.evaluate,
        "study": evaluation.study,
        "sequence": sequence.sequence,
        "lines": merging.lines,
        "soup": merging.soup,
        "export-data": students.export_data,
    },
}
"""The commands, in the groups that ``kvopt --help`` shows."""
TOGETHER = ("run", "mutate", "optimize", "score", "shorten", "train", "evaluate", "study")
"""Those that several processes of a launch do together."""


def _help(command: Callable[..., Any]) -> str:
    """A docstring with every paragraph on one line, so that the terminal's width decides where lines end."""
    paragraphs = (inspect.getdoc(command) or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


for panel, commands in PANELS.items():
    for name, command in commands.items():
        app.command(name, help=_help(command), rich_help_panel=panel)(command)

bench = typer.Typer(help="Measure speed and memory against other libraries.", invoke_without_command=True)
app.add_typer(bench, name="bench", rich_help_panel="Speed")
BENCHMARKS: dict[str, Callable[..., Any]] = {
    "kl": benchmarks.bench_kl,
    "step": benchmarks.bench_step,
    "score": benchmarks.bench_score,
    "long": benchmarks.bench_long,
}
for name, command in BENCHMARKS.items():
    bench.command(name, help=_help(command))(command)


def main() -> None:
    """Entry point of the ``kvopt`` command."""
    if isinstance(sys.stdout, TextIOWrapper):  # what a terminal cannot show is shown as its code, never an error
        sys.stdout.reconfigure(errors="backslashreplace")
    with _ctrl_c() as pressed:
        try:
            code = app(prog_name="kvopt", standalone_mode=False)
            if code == INTERRUPTED:  # typer turns Ctrl-C into this exit code
                _interrupted()
            LAUNCH.end(code if isinstance(code, int) else 0)
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
    """Exit with one line for every error that has one; return for any other."""
    if isinstance(error, KvoptError):
        _fail(str(error), error.exit_code)
    if isinstance(error, BrokenPipeError):
        sys.stderr.close()
        sys.exit(1)
    if isinstance(error, MemoryError) or ("torch" in sys.modules and _memory_ran_out(error)):
        _fail("out of memory; what is finished is kept; use smaller batches, or a device with more memory", 1)
    if isinstance(error, OSError):
        _fail(str(write_error(error, error.filename or "a file")), 1)
    if hasattr(error, "show") and hasattr(error, "exit_code"):  # wrong usage, as typer reports it
        _usage(error)


def _memory_ran_out(error: Exception) -> bool:
    """Whether torch, which is loaded, says so."""
    from kvopt.base.devices import is_out_of_memory

    return is_out_of_memory(error)


def _usage(error: Any) -> None:
    """One line for a wrong command line: what, in which command, and where its options are listed."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "kvopt"
    what = error.format_message().rstrip(".")
    _fail(str(InputError(what, where=command, fix=f"{command} --help lists what it takes")), error.exit_code)


def _fail(message: str, code: int) -> None:
    if LAUNCH.may_speak():
        print("error: " + " ".join(line.strip() for line in message.splitlines()), file=sys.stderr, flush=True)
    LAUNCH.end(code)
    sys.exit(code)


def _interrupted() -> None:
    if LAUNCH.is_first and is_first():
        print("interrupted; finished work is kept: run the same command again to go on", file=sys.stderr)
    sys.exit(INTERRUPTED)


def _version(value: bool) -> None:
    if value:
        print(f"kvopt {VERSION}")
        raise typer.Exit


def _help_without_command(context: typer.Context) -> None:
    """Help where no command is named, which is no error."""
    if context.invoked_subcommand is None:
        print(context.get_help())


bench.callback()(_help_without_command)


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand not in TOGETHER:
        one_process(f"kvopt {context.invoked_subcommand or ''}".rstrip())
    _help_without_command(context)


__all__ = ["app", "main"]
