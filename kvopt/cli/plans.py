"""The command plan, and the three lines of it that a run begins with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvopt.cli.common import ConfigPath, Json, Sets, next_command, print_json, say
from kvopt.errors import InputError

if TYPE_CHECKING:
    from kvopt.run.run import Run


def plan(
    config: ConfigPath,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            help="The hardware to plan for, such as h100-80gb (a wrong name lists all); here: this machine, measured"
            " for five seconds.",
        ),
    ] = "here",
    count: Annotated[int, typer.Option("--count", help="How many of these devices work together.")] = 1,
    sets: Sets = None,
    as_json: Json = False,
) -> None:
    """Say what a run will take, without loading weights: each stage's tokens, FLOPs, peak memory and time.

    Where it does not fit, the settings that make it fit are named. Times on named hardware count on 40 % of the
    products that its data sheet gives.
    """
    from kvopt.config.document import load_config

    settings, base_dir = load_config(config, sets or ())
    from kvopt.run.inputs import read_inputs
    from kvopt.run.planning import make_plan

    result = make_plan(read_inputs(settings, base_dir), device, count)
    if as_json:
        print_json(result)
        return
    show(result)
    next_command("run", config, sets=sets)


def show(result: dict[str, Any]) -> None:
    """The plan as a table, with the lines about it."""
    from kvopt.console.tables import console, plain_table

    table = plain_table()
    for heading, side in (("stage", "left"), ("tokens", "right"), ("TFLOP", "right"), ("peak GiB", "right")):
        table.add_column(heading, justify=side)  # type: ignore[arg-type]
    table.add_column("time", justify="right")
    table.add_column("")
    for stage in result["stages"]:
        note = ", ".join(filter(None, ("" if stage["fits"] else "does not fit", stage["about"])))
        table.add_row(stage["stage"], *_numbers(stage), note)
    table.add_section()
    table.add_row("all", *_numbers(result), "")
    console().print(table)
    for line in lines(result):
        print(line)
    print(f"hardware: {result['source']}")


def _numbers(item: dict[str, Any]) -> tuple[str, str, str, str]:
    peak = f"{item['peak_memory_bytes'] / 2**30:.2f}"
    return f"{item['tokens_in']:,}", f"{item['flops'] / 1e12:.3g}", peak, duration(item["seconds"])


def lines(result: dict[str, Any]) -> list[str]:
    """The plan in three lines: what it takes, whether it fits, what is not in it."""
    devices = result["device"] if result["count"] == 1 else f"{result['count']} x {result['device']}"
    fits = f"fits {result['memory_bytes'] / 2**30:.0f} GiB"
    if not result["fits"]:
        fits = "does not fit: " + ("; ".join(result["changes"]) or "no setting is known that mends it")
    return [
        f"plan: {result['tokens_in']:,} tokens, {result['flops'] / 1e12:.3g} TFLOP, about"
        f" {duration(result['seconds'])} on {devices} in {result['dtype']}",
        f"memory: {result['peak_memory_bytes'] / 2**30:.2f} GiB at the peak"
        f" ({result['weights_bytes'] / 2**30:.2f} of it weights), {fits}",
        "not counted: " + ("; ".join(result["not_counted"]) or "nothing"),
    ]


def duration(seconds: float) -> str:
    """In the largest unit that leaves at least 1."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def say_plan(run: Run) -> None:
    """The three lines, before a run begins; one that says why there are none where a base's work cannot be counted."""
    from kvopt.run.planning import plan_of_run

    try:
        for line in lines(plan_of_run(run.task())):
            say(line)
    except InputError as error:
        say(f"plan: none ({error})")
