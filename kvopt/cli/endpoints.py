"""The command that asks the endpoints of a config once: check-endpoint."""

from __future__ import annotations

import typer

from kvopt.cli.common import ConfigPath, Json, Sets, print_json
from kvopt.errors import InputError

SHOWN = 300


def check_endpoint(config: ConfigPath, sets: Sets = None, as_json: Json = False) -> None:
    """Ask every endpoint of the config once (paraphrase, judge), and say what came: answer, time, tokens, what was
    refused.

    The exit code is 1 where an answer cannot be used.
    """
    from kvopt.config.document import load_config
    from kvopt.run.endpoint_check import check_endpoints
    from kvopt.run.inputs import read_inputs

    answers = check_endpoints(read_inputs(*load_config(config, sets or ())))
    if not answers:
        raise InputError(
            "the config names no endpoint",
            where=str(config),
            fix="see mutations.generator, mutations.check and evaluate.metrics (kind: judge)",
        )
    if as_json:
        print_json([answer.to_json() for answer in answers])
    else:
        for one in answers:
            tokens = "" if one.tokens_in is None else f", {one.tokens_in} tokens in, {one.tokens_out} out"
            print(f"{one.where} ({one.model}): {one.seconds:.1f} s{tokens}")
            for line in one.said:
                print(f"  {line}")
            if one.answer:
                print("  " + " ".join(one.answer.split())[:SHOWN])
            if one.fault:
                print(f"  cannot be used: {one.fault}")
    if any(one.fault for one in answers):
        raise typer.Exit(1)
