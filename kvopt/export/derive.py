"""The commands that make one context of others: move, compose, truncate. They read folders, measure on a config's task
where one is given, and write a context folder with its origin in ``kvopt.json``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from kvopt.base.loading import Base
from kvopt.config.document import load_config
from kvopt.contexts.adapter import read_record
from kvopt.contexts.context import KVContext
from kvopt.contexts.folder import TensorContext, load_context, save_context
from kvopt.contexts.moving import WAYS, WITH_ROWS, Way, joined, moved, shortened
from kvopt.documents.context_record import FILE_NAME, ContextFacts, ContextOrigin, OriginSource, RecordedScores
from kvopt.errors import InputError, counted
from kvopt.export.source import Source, open_source
from kvopt.run.descend import MATCHING_ROWS
from kvopt.run.run import Run
from kvopt.task.seam import Row

_KEPT = ("template_sha256", "data_sha256", "reference_key", "scope", "objective", "template_tokens")


def move(context: str, offset: int, out: Path | None = None, *, base: str | None = None) -> dict[str, Any]:
    """Write a KV context with its first slot at ``offset``. Raises InputError."""
    source = _learned_source(context, base)
    folder = _place(out or Path(f"{source.name}-at-{offset}"), source)
    loaded = _load(source, source.base)
    if not isinstance(loaded, KVContext):
        raise _not_kv(source, "moved: its positions are those of the prompt it stands in")
    there = moved(loaded, offset, source.base)
    record = _record(ContextOrigin(operation="move", of=[], offset=offset), [source])
    save_context(there, folder, source.base, frozen=_frozen(source), first=offset, record=record)
    body = offset + loaded.tokens
    return {
        "folder": str(folder),
        "name": loaded.name,
        "tokens": loaded.tokens,
        "positions": {"first": offset, "body": body},
        "summary": f"{loaded.name}: slots at positions {offset} to {body - 1}, bodies start at {body}"
        + ("" if offset == 0 else "; PEFT starts them at the number of slots, so export it before you use it there"),
    }


def compose(
    first: str,
    second: str,
    out: Path | None = None,
    *,
    config: Path | None = None,
    sets: Sequence[str] = (),
    run_directory: Path | None = None,
    base: str | None = None,
    name: str | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Write ``second`` after ``first`` as one context; with a config, measure all three. Raises InputError."""
    if name is not None and not re.fullmatch(FILE_NAME, name):
        raise InputError(f"{name!r} is no name", where="--name", fix="give a plain file name; --out says where it goes")
    sources = [_learned_source(spec, base) for spec in (first, second)]
    name = name or "+".join(source.name for source in sources)
    folder = _place(out or Path(name), *sources)
    with _task(config, sets, run_directory, say) as run:
        model = run.load_base() if run else sources[0].base
        head, tail = (_load(source, model) for source in sources)
        pair = joined(head, tail, model, name)
        measured = [_measured(run, c) for c in (replace(head, name=sources[0].name), tail, pair)] if run else []
        record = _record(ContextOrigin(operation="compose", of=[]), sources, measured)
        save_context(pair, folder, model, frozen=_frozen(sources[0]), record=record)
    return {
        "folder": str(folder),
        "name": name,
        "tokens": pair.tokens,
        "kind": pair.kind,
        "measured": measured,
        "summary": f"{name}: {head.tokens} + {tail.tokens} {pair.kind} slots" + _unmeasured(run),
    }


def truncate(
    context: str,
    tokens: int,
    out: Path | None = None,
    *,
    by: str = "auto",
    config: Path | None = None,
    sets: Sequence[str] = (),
    run_directory: Path | None = None,
    base: str | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Write a KV context with ``tokens`` slots.

    With ``by="auto"`` every way is tried, the one with the least forward KL on the selection rows is kept, and the KL
    reported is that of the validation rows. Raises InputError.
    """
    if by not in ("auto", *get_args(Way)):
        raise InputError(f"no way {by!r}", where="--by", fix="one of auto, " + ", ".join(WAYS))
    if config is None and (by == "auto" or by in WITH_ROWS):
        raise InputError(
            f"--by {by} needs a task's rows", where="--config", fix="give the config, or --by first or --by last"
        )
    source = _learned_source(context, base)
    name = f"{source.name}-{tokens}"
    folder = _place(out or Path(name), source)
    with _task(config, sets, run_directory, say) as run:
        model = run.load_base() if run else source.base
        whole = _load(source, model)
        if not isinstance(whole, KVContext):
            raise _not_kv(source, "shortened: its slots were learned together")
        rows = _matching_rows(run) if run else ()
        ways: list[Way] = list(WAYS) if by == "auto" else [by]  # type: ignore[list-item]
        tried = [(way, shortened(whole, tokens, way, model, rows, f"{name}-{way}")) for way in ways]
        measured = [_measured(run, candidate, "selection") for _, candidate in tried] if run and by == "auto" else []
        costs = [row["kl_forward"]["mean"] for row in measured]
        way, best = tried[costs.index(min(costs))] if costs else tried[0]
        best = KVContext(name, best.states)
        if run:
            measured += [_measured(run, replace(whole, name=source.name)), _measured(run, best)]
        origin = ContextOrigin(operation="truncate", of=[], by=way, chosen_on="selection" if costs else None)
        frozen = min(_frozen(source), tokens)
        save_context(best, folder, model, frozen=frozen, record=_record(origin, [source], measured))
    return {
        "folder": str(folder),
        "name": name,
        "tokens": tokens,
        "by": way,
        "measured": measured,
        "summary": f"{name}: {tokens} of {counted(whole.tokens, 'slot')}, by {way}" + _unmeasured(run),
    }


@contextmanager
def _task(
    config: Path | None, sets: Sequence[str], directory: Path | None, say: Callable[[str], None] | None
) -> Iterator[Run | None]:
    """The run of a config, opened, or None without a config."""
    if config is None:
        yield None
        return
    settings, base_dir = load_config(config, sets)
    with Run(settings, base_dir, directory or Path("runs") / settings.name, say=say).opened() as run:
        yield run


def _matching_rows(run: Run) -> tuple[Row, ...]:
    """The rows that attention matching takes its queries from, as ``init: matched`` does."""
    return run.task().bare_rows("train").rows[:MATCHING_ROWS]


def _measured(run: Run | None, context: TensorContext, split: str = "validation") -> dict[str, Any]:
    if run is None:
        raise ValueError("nothing can be measured without a task")
    run.task().check_window(context.name, context.tokens)
    return {"name": context.name, "tokens": context.tokens, "split": split, **run.score(context, split).to_json()}


def _unmeasured(run: Run | None) -> str:
    return "" if run else " (not measured: give --config)"


def _learned_source(spec: str, base: str | None) -> Source:
    source = open_source(spec, base=base)
    if source.kind == "text":
        raise _not_kv(source, "changed like this: edit its text instead")
    return source


def _not_kv(source: Source, why: str) -> InputError:
    return InputError(f"a {source.kind} context cannot be {why}", where=source.name, fix="give a KV context")


def _load(source: Source, base: Base) -> TensorContext:
    if source.folder is None:
        raise ValueError("a learned context has a folder")
    return load_context(source.folder, base)


def _frozen(source: Source) -> int:
    return int(source.config.get("num_frozen_tokens") or 0)


def _record(origin: ContextOrigin, sources: Sequence[Source], measured: Sequence[dict[str, Any]] = ()) -> ContextFacts:
    """What ``kvopt.json`` says of a context that was made of ``sources``; the last row measured is its own."""
    origin.of = [
        OriginSource(name=source.name, content_sha256=source.record.content_sha256 if source.record else None)
        for source in sources
    ]
    facts = ContextFacts(origin=origin)
    if measured:
        scores = {key: value for key, value in measured[-1].items() if key not in ("name", "split")}
        facts.scores = {measured[-1]["split"]: RecordedScores.model_validate(scores)}
    if len(sources) == 1 and (first := sources[0].record) is not None:
        for name in _KEPT:
            if (value := getattr(first, name)) is not None:
                setattr(facts, name, value)
    return facts


def _place(folder: Path, *sources: Source) -> Path:
    """Refuse to write over the sources, or over anything but what one of these commands made."""
    if any(s.folder is not None and folder.resolve() == s.folder.resolve() for s in sources):
        raise InputError("is the context itself", where=str(folder), fix="choose another --out folder")
    record = read_record(folder) if folder.is_dir() else None
    ours = folder.is_dir() and (not any(folder.iterdir()) or (record is not None and record.origin is not None))
    if folder.exists() and not ours:
        raise InputError(
            "is there already and was not made by move, compose or truncate",
            where=str(folder),
            fix="choose another --out folder",
        )
    return folder
