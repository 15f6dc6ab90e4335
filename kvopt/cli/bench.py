"""Benchmarks that print ratios from one run: bench kl, bench step, bench score."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvopt.cli.common import ConfigPath, Json, Sets, print_json
from kvopt.errors import InputError

REAL_TOKENS = 512


def bench_kl(
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Write JSON and a picture here.")] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Measure extra memory by number of tokens instead, up to 131,072.")
    ] = False,
    real: Annotated[
        bool, typer.Option("--real", help="On hidden states of the built-in model instead of random ones.")
    ] = False,
    write_table: Annotated[
        bool,
        typer.Option("--write-table", help="Measure the backends alone and write the table that picks among them."),
    ] = False,
    seconds: Annotated[
        float,
        typer.Option(
            min=0,
            help="Time to take, in seconds: fewer tokens and rounds are measured, and slow implementations left out by"
            " name, to stay within it. 0 is no limit. Not for --memory and --write-table.",
        ),
    ] = 60,
    as_json: Json = False,
) -> None:
    """The divergence op against plain torch and other libraries: time, memory, and error by size of the KL."""
    from kvopt.kernels.benchmark import KLInputs, run_table
    from kvopt.kernels.benchmark import run as run_kl
    from kvopt.kernels.memory_curve import run_memory

    if memory + real + write_table > 1:
        given = [name for name, on in (("--memory", memory), ("--real", real), ("--write-table", write_table)) if on]
        raise InputError("measure different things", where=" and ".join(given), mend="give one of them")
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


def bench_step(config: ConfigPath, sets: Sets = None, as_json: Json = False) -> None:
    """One optimization step against PEFT's CARTRIDGE with a plain full-logits KL: time and peak memory."""
    from kvopt.bench import steps as benchmark
    from kvopt.config.document import load_config

    settings, base_dir = load_config(config, sets or ())
    show_bench(benchmark.as_json("step", benchmark.bench_step(settings, base_dir)), as_json)


def bench_score(
    config: ConfigPath,
    mutations: Annotated[int, typer.Option(help="Text mutations to score.")] = 8,
    rows: Annotated[int, typer.Option(help="Validation rows.")] = 64,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Scoring mutations behind a shared prefix against full prompts for each pair: wall-clock ratio."""
    from kvopt.bench import steps as benchmark
    from kvopt.config.document import load_config

    settings, base_dir = load_config(config, sets or ())
    variants = benchmark.bench_score(settings, base_dir, mutations=mutations, rows=rows)
    show_bench(benchmark.as_json("score", variants), as_json)


def show_bench(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    for row in result["variants"]:
        memory = row["peak_bytes"] / 2**20
        print(f"{row['name']:36s} {row['seconds']:8.2f} s  {memory:8.0f} MiB peak  KL {row['value']:.5f}")
    print(f"time ratio {result['time_ratio']:.2f}, peak memory ratio {result['peak_memory_ratio']:.2f}")
