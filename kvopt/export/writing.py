"""Writing an export: the format's files, ``kvopt-export.json`` and a README.md, in a folder of their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvopt.documents.export_record import ExportRecord
from kvopt.documents.part import BaseIdentity
from kvopt.documents.validated import write_document
from kvopt.errors import InputError
from kvopt.export.card import card
from kvopt.export.export_format import Written, chosen_format, refuse_kind
from kvopt.export.source import Source, open_source
from kvopt.storage.files import replacing_directory, write_text
from kvopt.version import VERSION

RECORD = "kvopt-export.json"
FORMAT_VERSION = 1


def export(
    context: str | Path,
    to: str,
    out: Path | None = None,
    *,
    base: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a context in another tool's format.

    Args:
        context: a context folder, or ``RUN#NAME`` (a learned context, a mutation, or ``original``).
        to: a format's name.
        out: the folder to write (default ``exports/NAME-TO``); an earlier export there is replaced, anything else
            refused.
        base: the model to use instead of the one that the context names.
        options: of that format, by name.

    Returns:
        What ``kvopt-export.json`` holds, and ``folder``.

    Raises:
        InputError: no such context, an option that the format does not take, a kind that it cannot hold, another base
            than the context's, or a folder with other things in it.
    """
    chosen = chosen_format(to, options or {})
    source = open_source(str(context), base=base)
    if source.kind not in chosen.takes:
        raise refuse_kind(source, to)
    if base is not None and source.kind != "text":
        source.check_base()
    folder = Path(out) if out is not None else Path("exports") / f"{source.name}-{to}"
    _check_place(folder, source)
    with replacing_directory(folder) as place:
        written = chosen.write(source, place)
        record = _record(source, to, written)
        write_document(place / RECORD, record)
        write_text(place / "README.md", card(source, to, written))
    return {"folder": str(folder), **record.to_json()}


def _record(source: Source, to: str, written: Written) -> ExportRecord:
    of_context = source.record.given() if source.record else {}
    template = source.template.sha256 if source.template else None
    return ExportRecord(
        format_version=FORMAT_VERSION,
        kvopt_version=VERSION,
        to=to,
        name=source.name,
        kind=source.kind,
        tokens=source.tokens,
        base=of_context.get("base") or BaseIdentity(name=source.base_name),
        template_sha256=of_context.get("template_sha256") or template,
        data_sha256=of_context.get("data_sha256"),
        content_sha256=of_context.get("content_sha256"),
        template_tokens=source.template_tokens,
        metrics=source.metrics,
        summary=written.summary,
        **written.facts.given(),
        snippet=written.snippet,
    )


def _check_place(folder: Path, source: Source) -> None:
    """An export replaces an earlier export and nothing else."""
    if source.folder is not None and folder.resolve() == source.folder.resolve():
        raise InputError("is the context itself", where=str(folder), fix="choose another --out folder")
    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / RECORD).is_file()):
        raise InputError("is there already and is no export", where=str(folder), fix="choose another --out folder")
