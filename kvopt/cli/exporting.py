"""Commands that take contexts elsewhere or make others of them: export, move, compose, truncate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kvopt.cli.common import Json, Sets, print_json, say
from kvopt.errors import InputError

BLOCK_SIZE = 16
TAKEN_BY = {"--peft-type": "peft", "--block-size": "vllm", "--partial-block": "vllm", "--config": "trl-dataset"}

ContextArgument = Annotated[
    str,
    typer.Argument(
        metavar="CONTEXT", help="A context folder, or RUN#NAME: a learned context, a mutation (m031), or original."
    ),
]
BaseOption = Annotated[
    str | None, typer.Option("--base", metavar="MODEL", help="The base to use instead of the one the context names.")
]
RunOption = Annotated[
    Path | None, typer.Option("--run", metavar="DIR", help="The run directory to measure in (default: runs/NAME).")
]


def export(
    context: ContextArgument,
    to: Annotated[str, typer.Option("--to", help="peft, prompt-embeds, hf-cache, text, trl-dataset or vllm.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The folder to write (default: exports/NAME-FORMAT).")
    ] = None,
    peft_type: Annotated[
        str | None, typer.Option(help="Of peft: CARTRIDGE or PREFIX_TUNING (kv), PROMPT_TUNING (soft).")
    ] = None,
    base: BaseOption = None,
    block_size: Annotated[
        int | None, typer.Option(min=1, help="Of vllm: tokens in a block of the server's cache (default: 16).")
    ] = None,
    partial_block: Annotated[
        bool, typer.Option("--partial-block", help="Of vllm: allow a last block that is not full.")
    ] = False,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="CONFIG.yaml", help="Of trl-dataset: the run's own config.")
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Upload the export to the Hugging Face hub too.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push-to-hub: a public repository.")] = False,
    as_json: Json = False,
) -> None:
    """Write a context for another tool: an adapter, embeddings, a cache, its text, a data set, or for vLLM."""
    from kvopt.export import Options
    from kvopt.export import export as write
    from kvopt.export.upload import check_repository, push

    _refuse_options_of_others(
        to, {"--peft-type": peft_type, "--block-size": block_size, "--partial-block": partial_block, "--config": config}
    )
    if push_to_hub is not None:
        check_repository(push_to_hub)
    elif public:
        raise InputError("says how to upload, and nothing is uploaded", where="--public", mend="add --push-to-hub")
    if to == "vllm":
        say("note: the vLLM connector is tested on a CPU alone, not on a server")
    options = Options(peft_type.upper() if peft_type else None, block_size or BLOCK_SIZE, partial_block, config)
    result = write(context, to, out, base=base, options=options)
    if push_to_hub is not None:
        result["pushed_to"] = push(Path(result["folder"]), push_to_hub, private=not public)
    if as_json:
        print_json(result)
        return
    print(result["summary"])
    print(f"{result['folder']}: README.md says how to use it")
    if "pushed_to" in result:
        print(result["pushed_to"])


def _refuse_options_of_others(to: str, given: dict[str, Any]) -> None:
    for option, value in given.items():
        if value and to != TAKEN_BY[option]:
            raise InputError(f"is of --to {TAKEN_BY[option]} alone", where=option, mend="leave it out")


def move(
    context: ContextArgument,
    offset: Annotated[int, typer.Option(help="The position that its first slot moves to.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Default: NAME-at-OFFSET here.")] = None,
    base: BaseOption = None,
    as_json: Json = False,
) -> None:
    """Rotate a KV context's keys to other positions: its bodies then start behind its last slot there."""
    from kvopt.export.derive import move as make

    _show(make(context, offset, out, base=base), as_json)


def compose(
    first: ContextArgument,
    second: ContextArgument,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="CONFIG.yaml", help="Measure the result on this task.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The new context's name (default: FIRST+SECOND).")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Default: a folder of that name.")] = None,
    base: BaseOption = None,
    sets: Sets = None,
    run: RunOption = None,
    as_json: Json = False,
) -> None:
    """Put one learned context behind another, re-rotated; with --config, say the KL of each and of the pair."""
    from kvopt.export.derive import compose as make

    _show(
        make(first, second, out, config=config, sets=sets or (), run_directory=run, base=base, name=name, say=say),
        as_json,
    )


def truncate(
    context: ContextArgument,
    tokens: Annotated[int, typer.Option(help="Slots to keep.")],
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="CONFIG.yaml", help="The task to choose the slots on and measure."),
    ] = None,
    by: Annotated[
        str,
        typer.Option(help="auto (the way that costs least KL on selection rows), refitted, attention, first, last."),
    ] = "auto",
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Default: NAME-TOKENS here.")] = None,
    base: BaseOption = None,
    sets: Sets = None,
    run: RunOption = None,
    as_json: Json = False,
) -> None:
    """Make a KV context shorter and say what that costs in KL."""
    from kvopt.export.derive import truncate as make

    _show(
        make(context, tokens, out, by=by, config=config, sets=sets or (), run_directory=run, base=base, say=say),
        as_json,
    )


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    print(result["summary"])
    for row in result.get("measured", []):
        print(
            f"  {row['name']:24s} {row['tokens']:5d} slots  forward KL {row['kl_forward']['mean']:.4f} ({row['split']})"
        )
    print(result["folder"])
