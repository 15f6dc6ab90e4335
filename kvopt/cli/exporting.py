"""Commands that write contexts for other tools or change them: export, move, compose, truncate."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from kvopt.cli.common import Json, Sets, print_json, say
from kvopt.errors import InputError
from kvopt.export.export_format import FORMATS, chosen_format, export_formats, options_of

ContextArgument = Annotated[
    str,
    typer.Argument(
        metavar="CONTEXT",
        help="A context folder, or RUN#NAME: the context NAME of the run directory RUN. NAME is a learned context, a"
        " mutation (m031), or original.",
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="The base model (default: the one that the context names)."),
]
RunOption = Annotated[
    Path | None, typer.Option("--run", metavar="DIR", help="The run directory to measure in (default: runs/NAME).")
]


def _export(
    context: ContextArgument,
    to: Annotated[str, typer.Option("--to", help=f"One of {', '.join(FORMATS.kinds)}.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The folder to write to (default: exports/NAME-FORMAT).")
    ] = None,
    base: BaseOption = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Also upload the export to the Hugging Face hub.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="With --push-to-hub: make the repository public.")] = False,
    as_json: Json = False,
    **options: Any,
) -> None:
    given = {name: value for name, value in options.items() if value}
    chosen_format(to, given)  # a mistake in it is reported before torch is loaded
    from kvopt.export.upload import check_repository, push
    from kvopt.export.writing import export as write

    if push_to_hub is not None:
        check_repository(push_to_hub)
    elif public:
        raise InputError("has no effect without an upload", where="--public", mend="add --push-to-hub")
    if to == "vllm":
        say("note: the vLLM connector is tested only on a CPU, not on a server")
    result = write(context, to, out, base=base, options=given)
    if push_to_hub is not None:
        result["pushed_to"] = push(Path(result["folder"]), push_to_hub, private=not public)
    if as_json:
        print_json(result)
        return
    print(result["summary"])
    print(f"{result['folder']}: README.md says how to use it")
    if "pushed_to" in result:
        print(result["pushed_to"])


def _with_flags_of_formats(command: Callable[..., None]) -> Callable[..., None]:
    """The command with a flag for every option of every format in the place of its ``**options``."""
    signature = inspect.signature(command, eval_str=True)
    parameters = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    for name, (to, field) in options_of(export_formats()).items():
        flag, flags_only = "--" + name.replace("_", "-"), field.annotation is bool
        help_text = f"Of {to}: {field.description}" + ("" if not field.default or flags_only else f" ({field.default})")
        kind: Any = bool if flags_only else field.annotation | None  # type: ignore[operator]
        annotated = Annotated[kind, typer.Option(flag, help=help_text + ".")]
        default = False if flags_only else None
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotated)
        )

    @functools.wraps(command)
    def export(**values: Any) -> None:
        command(**values)

    export.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    export.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    export.__doc__ = (
        "Write a context for another tool: a PEFT adapter, embeddings, a KV cache, text, data, or for vLLM."
    )
    del export.__wrapped__  # type: ignore[attr-defined]
    return export


export = _with_flags_of_formats(_export)


def move(
    context: ContextArgument,
    offset: Annotated[int, typer.Option(help="The position that the first slot moves to.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The folder to write to (default: NAME-at-OFFSET).")
    ] = None,
    base: BaseOption = None,
    as_json: Json = False,
) -> None:
    """Move a KV context to other positions, by rotating its keys.

    The rest of a prompt then starts at the position after the last slot.
    """
    from kvopt.export.derive import move as make

    _show(make(context, offset, out, base=base), as_json)


def compose(
    first: ContextArgument,
    second: ContextArgument,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="CONFIG.yaml", help="Measure the result on this task.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The name of the new context (default: FIRST+SECOND).")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The folder to write to (default: the name).")
    ] = None,
    base: BaseOption = None,
    sets: Sets = None,
    run: RunOption = None,
    as_json: Json = False,
) -> None:
    """Join two learned contexts: the second one moves to the positions after the first.

    With --config, the KL of each and of the pair is measured.
    """
    from kvopt.export.derive import compose as make

    _show(
        make(first, second, out, config=config, sets=sets or (), run_directory=run, base=base, name=name, say=say),
        as_json,
    )


def truncate(
    context: ContextArgument,
    tokens: Annotated[int, typer.Option(help="How many slots to keep.")],
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="CONFIG.yaml",
            help="The task that decides which slots to keep, and that measures the result.",
        ),
    ] = None,
    by: Annotated[
        str,
        typer.Option(
            help="Which slots: refitted (most attended, values fitted again), attention (most attended), first, last,"
            " or auto, the way with the lowest KL on selection rows."
        ),
    ] = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="The folder to write to (default: NAME-TOKENS).")
    ] = None,
    base: BaseOption = None,
    sets: Sets = None,
    run: RunOption = None,
    as_json: Json = False,
) -> None:
    """Make a KV context shorter, and measure what that costs in KL."""
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
