"""What every exporter is: a name, the kinds of context it can express, and a function that writes a folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from kvopt.documents.export_record import ExportFacts
from kvopt.errors import InputError
from kvopt.export.source import Source


@dataclass(frozen=True)
class Options:
    """What some exporters can be told.

    Attributes:
        peft_type: of ``peft``: CARTRIDGE, PREFIX_TUNING or PROMPT_TUNING; None for the kind's own.
        block_size: of ``vllm``: tokens in a block of the server's paged cache.
        partial_block: of ``vllm``: allow a last block that is not full.
        config: of ``trl-dataset``: the config that the run was given, which says where its data are.
    """

    peft_type: str | None = None
    block_size: int = 16
    partial_block: bool = False
    config: Path | None = None


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


@dataclass(frozen=True)
class Exporter:
    """One format: ``write(source, empty folder, options)``."""

    name: str
    kinds: tuple[str, ...]
    write: Callable[[Source, Path, Options], Written]


def base_lines(base: str) -> str:
    """Python that sets ``base`` to what ``from_pretrained`` reads: a hub id, a folder, the built-in base's folder."""
    from kvopt.config.model import BUILTIN_BASE

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
