"""The command line: a thin face over the run. ``--json`` prints one document on stdout; everything else goes to stderr.

Exit codes: 0 done, 1 failed, 2 the input is wrong, 130 interrupted (the same command goes on).
"""

from __future__ import annotations

import json
import sys
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import kvopt
from kvopt.errors import KvoptError
from kvopt.files import write_error

if TYPE_CHECKING:
    from kvopt.run import Run

WIDTH_OF_FILES = 120  # columns of a table that goes to a file or a pipe

INTERRUPTED = 130

app = typer.Typer(
    name="kvopt",
    help="Find contexts that make a language model behave as a prompt template makes it behave.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

bench = typer.Typer(help="Benchmarks that print ratios from one run.", no_args_is_help=True)
app.add_typer(bench, name="bench")

ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG.yaml", help="The config file; kvopt init writes a starter.")
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="a.b=c", help="Change one config value; may be repeated.")
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run directory (default: runs/NAME).")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]


def main() -> None:
    """Entry point of the ``kvopt`` command."""
    try:
        code = app(standalone_mode=False)
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
            error.show()
            sys.exit(error.exit_code)
        raise
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    print("error: " + " ".join(line.strip() for line in message.splitlines()), file=sys.stderr)
    sys.exit(code)


def _interrupted() -> None:
    print("interrupted; finished work is kept: run the same command again to go on", file=sys.stderr)
    sys.exit(INTERRUPTED)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _run(config: Path, sets: list[str] | None, out: Path | None) -> Run:
    from kvopt.config import load_config
    from kvopt.run import Run

    settings, base_dir = load_config(config, sets or ())
    return Run(settings, base_dir, out or Path("runs") / settings.name, say=_say)


def _print_json(value: Any) -> None:
    unicode = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
    print(json.dumps(value, indent=2, ensure_ascii=not unicode, allow_nan=False))


def _show(board: dict[str, Any], folder: Path, as_json: bool) -> None:
    from rich.console import Console

    from kvopt.report.leaderboard import table

    if as_json:
        _print_json(board)
    else:
        Console(width=None if sys.stdout.isatty() else WIDTH_OF_FILES).print(table(board))
        print(f"run directory: {folder}")


@app.command()
def demo(
    fast: Annotated[bool, typer.Option("--fast", help="Fewer rows, mutations and steps: about a minute.")] = False,
    sets: Sets = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Learn and compare contexts for a docstring template, on a 135M model and your own Python's standard library."""
    source = resources.files("kvopt") / "configs" / ("demo-fast.yaml" if fast else "demo.yaml")
    with resources.as_file(source) as path:
        run = _run(path, sets, out)
        with run.opened():
            board = run.run()
    _show(board, run.directory.path, as_json)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Where the starter config goes.")] = Path(),
    infer: Annotated[
        Path | None, typer.Option("--infer", metavar="FILE", help="Recover the template from already rendered prompts.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that are there.")] = False,
) -> None:
    """Write a starter config, or one whose template and data are recovered from rendered prompts."""
    from kvopt.starter import write_inferred, write_starter

    written = write_inferred(infer, folder, force) if infer else write_starter(folder, force)
    for path in written:
        _say(f"wrote {path}")
    _say(f"next: kvopt validate {folder / 'kvopt.yaml'}")


@app.command()
def validate(config: ConfigPath, sets: Sets = None, as_json: Json = False) -> None:
    """Check config, template, data and the token seam, without loading the model's weights."""
    from kvopt.config import load_config
    from kvopt.validation import check

    settings, base_dir = load_config(config, sets or ())
    report = check(settings, base_dir)
    if as_json:
        _print_json(report)
        return
    for warning in report["warnings"]:
        _say(f"warning: {warning}")
    for key, value in report.items():
        if key != "warnings":
            print(f"{key}: {value}")


@app.command("run")
def run_all(config: ConfigPath, sets: Sets = None, out: Out = None, as_json: Json = False) -> None:
    """All stages: reference, mutations, learned contexts, scores, leaderboard. Run it again to go on after an
    interruption.
    """
    run = _run(config, sets, out)
    with run.opened():
        board = run.run()
    _show(board, run.directory.path, as_json)


@app.command()
def mutate(config: ConfigPath, sets: Sets = None, out: Out = None, as_json: Json = False) -> None:
    """Sample text mutations of the template; writes mutations.jsonl with every candidate and why it was rejected."""
    run = _run(config, sets, out)
    with run.opened():
        found = run.mutations
    from kvopt.mutate.record import counts_by_reason

    counts = counts_by_reason(found)
    if as_json:
        _print_json({"counts": counts, "accepted": [m.to_json() for m in found if m.accepted]})
        return
    for reason, count in counts.items():
        print(f"{count:6d}  {reason}")
    print(run.directory / "mutations.jsonl")


@app.command()
def score(
    config: ConfigPath,
    context: Annotated[
        list[str] | None,
        typer.Option(
            "--context", help="original, none, text:FILE, mutations:FILE, a context's name or folder; may be repeated."
        ),
    ] = None,
    sets: Sets = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Score contexts on the validation rows: forward KL, gold NLL (= pre-update loss), top-1 agreement."""
    from kvopt.report.leaderboard import Entry, build_leaderboard

    run = _run(config, sets, out)
    with run.opened():
        contexts = [c for spec in context or ["original", "none"] for c in run.named_context(spec)]
        entries = [Entry.of(c, run.score(c)) for c in contexts]
        board = build_leaderboard(entries, [], run.noise_floor(), run.facts())
    if as_json:
        _print_json({**board, "contexts": [entry.to_json() for entry in entries]})
    else:
        _show(board, run.directory.path, False)


@app.command()
def optimize(
    config: ConfigPath,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="NAME", help="Learn this context only; may be repeated.")
    ] = None,
    sets: Sets = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Learn the config's soft prompts and KV caches by gradient descent on the KL."""
    run = _run(config, sets, out)
    with run.opened():
        learned = run.learned(only or ())
        rows = [
            {"name": c.name, "kind": c.kind, "tokens": c.tokens, **run.score(c).to_json(), "history": run.history(c)}
            for c in learned
        ]
    if as_json:
        _print_json({"contexts": rows})
        return
    for row in rows:
        folder = run.directory / "contexts" / row["name"]
        kl = row["kl_forward"]["mean"]
        curve = ", ".join(f"{point['step']}: {point['held_out_kl']:.4f}" for point in row["history"])
        print(f"{row['name']}: {row['tokens']} {row['kind']} slots, forward KL {kl:.4f}, {folder}")
        print(f"  held-out KL by step: {curve}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    as_json: Json = False,
) -> None:
    """Print the leaderboard of one or more runs."""
    from kvopt.report.leaderboard import read_leaderboard

    boards = [read_leaderboard(folder) for folder in runs]
    if as_json:
        _print_json(boards[0] if len(boards) == 1 else {"runs": boards})
        return
    for folder, board in zip(runs, boards, strict=True):
        _show(board, folder, False)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A learned context.")], as_json: Json = False
) -> None:
    """Say what a context folder is, for which base, how good, and how to use it."""
    from kvopt.contexts.inspection import describe, describe_text

    facts = describe(folder)
    if as_json:
        _print_json(facts)
    else:
        print(describe_text(facts))


@bench.command("kl")
def bench_kl(
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Write JSON and a picture here.")] = None,
    as_json: Json = False,
) -> None:
    """The divergence op against plain torch and other libraries: time, memory, and error by size of the KL."""
    from kvopt.kernels.benchmark import run as run_kl

    result = run_kl(out=out)
    if as_json:
        _print_json(result)


@bench.command("step")
def bench_step(config: ConfigPath, sets: Sets = None, as_json: Json = False) -> None:
    """One optimization step against PEFT's CARTRIDGE with a plain full-logits KL: time and peak memory."""
    from kvopt import benchmark
    from kvopt.config import load_config

    settings, base_dir = load_config(config, sets or ())
    _show_bench(benchmark.as_json("step", benchmark.bench_step(settings, base_dir)), as_json)


@bench.command("score")
def bench_score(
    config: ConfigPath,
    mutations: Annotated[int, typer.Option(help="Text mutations to score.")] = 8,
    rows: Annotated[int, typer.Option(help="Validation rows.")] = 64,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Scoring mutations behind a shared prefix against full prompts for each pair: wall-clock ratio."""
    from kvopt import benchmark
    from kvopt.config import load_config

    settings, base_dir = load_config(config, sets or ())
    variants = benchmark.bench_score(settings, base_dir, mutations=mutations, rows=rows)
    _show_bench(benchmark.as_json("score", variants), as_json)


def _show_bench(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _print_json(result)
        return
    for row in result["variants"]:
        memory = row["peak_bytes"] / 2**20
        print(f"{row['name']:36s} {row['seconds']:8.2f} s  {memory:8.0f} MiB peak  KL {row['value']:.5f}")
    print(f"time ratio {result['time_ratio']:.2f}, peak memory ratio {result['peak_memory_ratio']:.2f}")


@app.command("config")
def show_config(
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of the config file.")] = False,
) -> None:
    """Print the commented starter config, or the JSON schema of config files."""
    if schema:
        from kvopt.config import Config

        _print_json(Config.model_json_schema())
    else:
        print((resources.files("kvopt") / "configs" / "template.yaml").read_text("utf-8"))


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

if __name__ == "__main__":
    main()
