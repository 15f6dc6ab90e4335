"""What every format of an export is: options, the kinds of context it can hold, and how it writes a folder."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic.fields import FieldInfo

from kvopt.config.faults import build_model
from kvopt.config.kinds import Family, Options
from kvopt.config.model import BUILTIN_BASE
from kvopt.documents.export_record import ExportFacts
from kvopt.errors import InputError

if TYPE_CHECKING:
    from kvopt.export.source import Source


@dataclass(frozen=True)
class Written:
    """What an exporter put into the folder.

    Attributes:
        summary: one sentence that says what the folder is.
        snippet: Python that uses it, run from inside the folder.
        library: of the model card: peft, transformers, vllm, …
        commands: shell commands that serve it, run from inside the folder; empty for none.
        notes: what a user must know, one sentence or more each.
        facts: further entries of ``kvopt-export.json``.
    """

    summary: str
    snippet: str
    library: str
    commands: str = ""
    notes: tuple[str, ...] = ()
    facts: ExportFacts = field(default_factory=ExportFacts)


class ExportFormat(Options):
    """One format with its options, which are also the flags of ``kvopt export``.

    Attributes:
        takes: the kinds of context that it can hold: kv, soft, text.
        rank: its place in lists of formats, lowest first.
        caution: what a user must know before the export; None for nothing.
    """

    takes: ClassVar[tuple[str, ...]] = ()
    rank: ClassVar[int] = 100
    caution: ClassVar[str | None] = None

    def write(self, source: Source, place: Path) -> Written:
        """Put the context into an empty folder. Raises InputError for what the format cannot hold."""
        raise NotImplementedError


FORMATS: Family[ExportFormat] = Family("kvopt.export.formats", "format")


@cache
def export_formats() -> Mapping[str, type[ExportFormat]]:
    """Every format by its name, in the order of lists."""
    members = FORMATS.members
    if not all(issubclass(options, ExportFormat) for options in members.values()):
        raise TypeError("every file of kvopt/export/formats defines an ExportFormat")
    return dict(sorted(members.items(), key=lambda member: (member[1].rank, member[0])))


def options_of(to: str) -> Mapping[str, FieldInfo]:
    """The options of a format by name."""
    return {name: field for name, field in export_formats()[to].model_fields.items() if name != "kind"}


def takers(option: str) -> list[str]:
    """The formats that take an option; several may take one of the same name."""
    return [to for to in export_formats() if option in options_of(to)]


def flag(option: str) -> str:
    """An option's name on the command line."""
    return "--" + option.replace("_", "-")


def chosen_format(to: str, given: Mapping[str, Any]) -> ExportFormat:
    """The format ``to`` with the options given, by their names in Python; the others are at their defaults.

    Raises:
        InputError: no such format, an option that it does not take, or a value that it cannot have.
    """
    for name in given:
        if (of := takers(name)) and to not in of:
            raise InputError(f"is of --to {' and '.join(of)} alone", where=flag(name), fix="leave it out")
    if to not in export_formats():
        raise InputError(f"no format {to!r}", where="--to", fix="one of " + ", ".join(export_formats()))
    for name in given:
        if name not in (known := options_of(to)):
            close = difflib.get_close_matches(name, known, n=1)
            fix = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(known) or 'no options'}"
            raise InputError(f"no option {name!r}", where=f"--to {to}", fix=fix)
    return build_model(export_formats()[to], dict(given), f"--to {to}")


def base_lines(base: str) -> str:
    """Python that sets ``base`` to what ``from_pretrained`` reads: a hub id, a folder, the built-in base's folder."""
    if base == BUILTIN_BASE:
        return "from kvopt.base.builtin import builtin_folder\n\nbase = str(builtin_folder(print))  # the built-in base"
    if base.lower().endswith(".gguf"):
        return f"from kvopt.base.places import locate\n\nbase = str(locate({base!r}, None, print))  # converted once"
    return f"base = {base!r}"


def ids_lines(source: Source) -> str:
    """Python that sets ``ids`` to what is fed after the context: the ids of a whole prompt, where the run's template
    is known, without those that the context stands for. Text that is cut at the slot can have others.
    """
    example = source.prompt_example()
    if example is None:
        return (
            'body = "What follows the context in your prompt."\n'
            'ids = tokenizer(body, add_special_tokens=False)["input_ids"]'
        )
    cut = f"{example.replaced}:{-1 if example.ends_with_eos and example.special else ''}"
    return (
        f"prompt = {example.text!r}  # with your values in the slots\n"
        f'ids = tokenizer(prompt, add_special_tokens={example.special})["input_ids"][{cut}]'
        f"  # the context stands for the first {example.replaced}"
    )


def refuse_kind(source: Source, to: str) -> InputError:
    """The error for a kind of context that a format has no place for; it names the formats that have."""
    able = [name for name, other in export_formats().items() if source.kind in other.takes]
    return InputError(f"{to} cannot hold a {source.kind} context", where=source.name, fix=f"use --to {', '.join(able)}")
