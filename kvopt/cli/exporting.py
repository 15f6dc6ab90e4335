"""Commands that write contexts for other tools or change them: export, move, compose, truncate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvopt.cli.common import Json, Sets, next_command, print_json, say
from kvopt.errors import InputError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

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


class _WithFormatFlags:
    """A command that also takes the options of every export format. Formats are loaded when the command line is built
    from the command's signature, so importing this module stays light.
    """

    def __init__(self, command: Callable[..., None]) -> None:
        self._command = command
        self.__name__, self.__doc__ = command.__name__, command.__doc__
        self.__annotations__: dict[str, Any] = {}  # all types stand in the signature

    def __call__(self, **values: Any) -> None:
        self._command(**values)

    @property
    def __signature__(self) -> Signature:
        from kvopt.export.export_format import export_formats, options_of

        own = signature(self._command, eval_str=True)
        parameters = {name: p for name, p in own.parameters.items() if p.kind is not Parameter.VAR_KEYWORD}
        *names, last = export_formats()
        to = typer.Option("--to", help=f"{', '.join(names)} or {last}.")
        parameters["to"] = parameters["to"].replace(annotation=Annotated[str, to])
        options: dict[str, dict[str, FieldInfo]] = {}
        for format_name in export_formats():
            for option, field in options_of(format_name).items():
                options.setdefault(option, {})[format_name] = field
        return own.replace(parameters=[*parameters.values(), *(_flag(name, of) for name, of in options.items())])


def _flag(name: str, fields: Mapping[str, FieldInfo]) -> Parameter:
    """The flag of one option, given its field in every format that takes it: None unless it is given, so that the
    format's own default stands.
    """
    from kvopt.export.export_format import flag

    first = next(iter(fields.values()))
    extra: Any = first.json_schema_extra or {}
    limits = first.metadata if len(fields) == 1 else ()  # else each format checks its own
    option = typer.Option(
        flag(name),
        metavar=extra.get("metavar"),
        min=next((limit.ge for limit in limits if hasattr(limit, "ge")), None),
        help=" ".join(f"Of {to}: {field.description}{_default(field)}." for to, field in fields.items()),
    )
    kind: Any = first.annotation | None  # type: ignore[operator]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])


def _default(field: FieldInfo) -> str:
    return "" if field.default in (None, False) else f" (default: {field.default})"


@_WithFormatFlags
def export(
    context: ContextArgument,
    to: str,
    *,
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
    """Write a context in the format of another tool; --to says which."""
    from kvopt.export.export_format import chosen_format

    given = {name: value for name, value in options.items() if value is not None}
    chosen = chosen_format(to, given)  # a mistake in it is reported before torch is loaded
    from kvopt.export.upload import check_repository, push
    from kvopt.export.writing import export as write

    if push_to_hub is not None:
        check_repository(push_to_hub)
    elif public:
        raise InputError("has no effect without an upload", where="--public", fix="add --push-to-hub")
    if chosen.caution:
        say(f"note: {chosen.caution}")
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
    next_command("inspect", result["folder"])


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
    next_command("inspect", result["folder"])
