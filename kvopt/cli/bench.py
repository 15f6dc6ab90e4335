"""Benchmarks that print ratios from one run: bench kl, bench step, bench score."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kvopt.cli.common import ConfigPath, Json, Sets, print_json
from kvopt.errors import InputError

REAL_TOKENS = 512


def bench_kl(
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Also write JSON, a table and a picture here.")
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Measure memory instead of time, for up to 131,072 tokens.")
    ] = False,
    real: Annotated[
        bool, typer.Option("--real", help="Use hidden states of the built-in model instead of random ones.")
    ] = False,
    write_table: Annotated[
        bool,
        typer.Option(
            "--write-table",
            help="Measure only kvopt's own backends, and write the table that chooses one.",
        ),
    ] = False,
    seconds: Annotated[
        float,
        typer.Option(
            min=0,
            help="About how many seconds to take. To stay within them, fewer tokens and rounds are measured, and slow"
            " implementations are left out and named. 0 is no limit. Not for --memory and --write-table.",
        ),
    ] = 60,
    as_json: Json = False,
) -> None:
    """Compare the KL op with plain torch and other libraries: time, memory, and error for small and large KL."""
    from kvopt.kernels.benchmark import KLInputs, run_table
    from kvopt.kernels.benchmark import run as run_kl
    from kvopt.kernels.memory_curve import run_memory

    if memory + real + write_table > 1:
        given = [name for name, on in (("--memory", memory), ("--real", real), ("--write-table", write_table)) if on]
        raise InputError("cannot be measured in one call", where=" and ".join(given), fix="give one of them")
    if memory:
        result = run_memory(out=out)
    elif write_table:
        result = run_table(out=out)
    elif real:
        from kvopt.bench.real_states import real_states

        states = real_states(REAL_TOKENS)
        timed = list(states.candidates)[2]
        inputs = KLInputs(
            states.reference, states.candidates, states.head.weight, timed, "states of the built-in model"
        )
        result = run_kl([inputs], out=out, seconds=seconds or None)
    else:
        result = run_kl(out=out, seconds=seconds or None)
    if as_json:
        print_json(result)


Seconds = Annotated[
    float,
    typer.Option(
        min=0,
        help="About how many seconds to measure for, beside loading the model in two processes: sizes are cut to fit."
        " 0 is no limit.",
    ),
]


def bench_step(config: ConfigPath, seconds: Seconds = 60, sets: Sets = None, as_json: Json = False) -> None:
    """Compare one optimization step, its rows packed and padded, with PEFT's CARTRIDGE and a KL of all logits: time and
    peak memory.
    """
    from kvopt.bench import steps as benchmark
    from kvopt.bench import variants
    from kvopt.config.document import load_config

    settings, base_dir = load_config(config, sets or ())
    measured = benchmark.bench_step(settings, base_dir, seconds=seconds or None)
    show_bench(variants.as_json("step", measured), as_json)


def bench_score(
    config: ConfigPath,
    mutations: Annotated[int, typer.Option(help="How many text mutations to score, at most.")] = 8,
    rows: Annotated[int, typer.Option(help="How many validation rows to score them on, at most.")] = 64,
    seconds: Seconds = 60,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Compare scoring mutations after a shared prefix with running every full prompt: time."""
    from kvopt.bench import steps as benchmark
    from kvopt.bench import variants
    from kvopt.config.document import load_config

    settings, base_dir = load_config(config, sets or ())
    measured = benchmark.bench_score(settings, base_dir, mutations=mutations, rows=rows, seconds=seconds or None)
    show_bench(variants.as_json("score", measured), as_json)


def bench_long(
    config: ConfigPath,
    tokens: Annotated[
        list[int] | None,
        typer.Option("--tokens", metavar="N", min=1, help="Gold tokens; may be repeated. Default: 1,024 to 32,768."),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0, help="Begin no larger number of tokens after about so long. 0 is no limit.")
    ] = 60,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Measure a reference, a score and a step from short to very long gold outputs: time and memory per token."""
    from kvopt.bench.long_gold import TOKENS, LongPoint, as_document
    from kvopt.bench.long_gold import bench_long as measure
    from kvopt.config.document import load_config

    settings, base_dir = load_config(config, sets or ())

    def show(point: LongPoint) -> None:
        print(
            f"{point.stage:10s} {point.gold_tokens:7,d} gold tokens ({point.row_tokens:,} a row)"
            f" {point.microseconds_per_token:9.0f} us/token  {point.extra_bytes / 2**20:8.0f} MiB beyond the model",
            file=sys.stderr if as_json else sys.stdout,
            flush=True,
        )

    result = as_document(measure(settings, base_dir, tokens=tokens or TOKENS, seconds=seconds or None, measured=show))
    if as_json:
        print_json(result)
        return
    for stage, grown in result["growth"].items():
        print(
            f"{stage}: with {grown['tokens']:g} times the tokens, {grown['seconds_per_token']:.2f} times the time per"
            f" token and {grown['extra_bytes']:.2f} times the memory"
        )


def show_bench(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    for row in result["variants"]:
        memory = row["peak_bytes"] / 2**20
        print(
            f"{row['name']:36s} {row['seconds']:8.2f} s  {memory:8.0f} MiB at most, {row['memory_of']}  "
            f"KL {row['value']:.5f}  ({row['size']})"
        )
    print(f"time ratio {result['time_ratio']:.2f}, peak memory ratio {result['peak_memory_ratio']:.2f}")
    if result["floor_share"] is not None:
        print(f"bare matrix products in the same run: {result['floor_share']:.0%} of kvopt's time")
