"""What every format of an export is: options, the kinds of context it can hold, and how it writes a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
        notes: what a user must know, one sentence or more each.
        facts: further entries of ``kvopt-export.json``.
    """

    summary: str
    snippet: str
    library: str
    notes: tuple[str, ...] = ()
    facts: ExportFacts = field(default_factory=ExportFacts)


class ExportFormat(Options):
    """One format with its options, which are also the flags of ``kvopt export``; ``takes`` are the kinds of context
    that it can hold.
    """

    takes: ClassVar[tuple[str, ...]] = ()

    def write(self, source: Source, place: Path) -> Written:
        """Put the context into an empty folder. Raises InputError for what the format cannot hold."""
        raise NotImplementedError


FORMATS: Family[ExportFormat] = Family("kvopt.export.formats", "format")


def export_formats() -> dict[str, type[ExportFormat]]:
    """Every format by its name."""
    members = {name: options for name, options in FORMATS.members.items() if issubclass(options, ExportFormat)}
    if len(members) < len(FORMATS.members):
        raise TypeError("every file of kvopt/export/formats defines an ExportFormat")
    return members


def options_of(formats: Mapping[str, type[ExportFormat]]) -> dict[str, tuple[str, FieldInfo]]:
    """The options of all formats by name: the format that takes it, and the field."""
    return {
        name: (to, field)
        for to, options in formats.items()
        for name, field in options.model_fields.items()
        if name != "kind"
    }


def chosen_format(to: str, given: Mapping[str, Any]) -> ExportFormat:
    """The format ``to`` with the options given. Raises InputError for a format or an option that does not exist."""
    formats = export_formats()
    if to not in formats:
        raise InputError(f"no format {to!r}", where="--to", mend="one of " + ", ".join(formats))
    known = options_of(formats)
    for name in given:
        flag = "--" + name.replace("_", "-")
        if name not in known:
            raise InputError("is no option of any format", where=flag, mend="known: " + ", ".join(known))
        if known[name][0] != to:
            raise InputError(f"is of --to {known[name][0]} alone", where=flag, mend="leave it out")
    format_ = build_model(formats[to], {"kind": to, **given}, f"--to {to}")
    assert isinstance(format_, ExportFormat)
    return format_


def base_lines(base: str) -> str:
    """Python that sets ``base`` to what ``from_pretrained`` reads: a hub id, a folder, the built-in base's folder."""
    if base == BUILTIN_BASE:
        return "from kvopt.base.builtin import builtin_folder\n\nbase = str(builtin_folder(print))  # the built-in base"
    if base.lower().endswith(".gguf"):
        return f"from kvopt.base.loading import locate\n\nbase = str(locate({base!r}, None, print))  # converted once"
    return f"base = {base!r}"


def body_line(source: Source) -> str:
    """Python that sets ``body``: the prompt from the first slot on, as the run's template gives it where known."""
    example = source.body_example()
    if example is None:
        return 'body = "What follows the context in your prompt."'
    return f"body = {example!r}  # with your values in the slots"


def refuse_kind(source: Source, to: str, able: str) -> InputError:
    """The error for a kind of context that a format has no place for; ``able`` names the formats that have."""
    return InputError(f"{to} cannot hold a {source.kind} context", where=source.name, mend=able)
