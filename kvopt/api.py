"""kvopt from Python, in one call each: learn a context for a template, compare learned with sampled contexts, export.

Every call works in a folder that the command line reads too: ``kvopt.yaml``, ``examples.jsonl`` and the run directory
``run/``. The folder is named by a hash of the call's arguments and files, so a second call with the same ones finds
everything done, and another call never works in the same folder.

Below them are functions for loops of your own, which keep nothing on disk: :class:`Task`, :meth:`Base.load`,
:func:`learn`, :func:`score` and :func:`kl` (:mod:`kvopt.run.library`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kvopt.base.loading import Base
from kvopt.config.calls import TemplateLike, laid_over, mapping, settings_of, template_section
from kvopt.config.document import load_config
from kvopt.errors import InputError
from kvopt.export.writing import export
from kvopt.run.library import Task, kl, learn, score
from kvopt.run.run import Run
from kvopt.storage.files import canonical_json, sha256_file, sha256_json, write_jsonl, write_text

__all__ = [
    "Base",
    "Comparison",
    "LearnedContext",
    "Task",
    "compare_contexts",
    "export_context",
    "kl",
    "learn",
    "optimize_context",
    "score",
]

OURS = "# Written by a call of kvopt from Python; the next call in this folder writes it anew.\n"
CALL = "# call: "
HASH_DIGITS = 12
PLACES = ("context:", "text:")  # beginnings of a context's init that go on with a path

Examples = str | Path | Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class LearnedContext:
    """A context that was learned, and how well it does on rows that it never saw.

    Attributes:
        name, kind, tokens: of the context.
        folder: a PEFT adapter folder.
        kl: forward KL on the validation rows, nats per gold token.
        interval: its 95 % interval, None for a single row.
        score: everything that ``kvopt score --json`` says of it.
    """

    name: str
    kind: str
    tokens: int
    folder: Path
    kl: float
    interval: tuple[float, float] | None
    score: dict[str, Any]

    def export(self, to: str, out: str | Path | None = None, **options: Any) -> Path:
        """As :func:`export_context`."""
        return export_context(self.folder, to, out, **options)


@dataclass(frozen=True)
class Comparison:
    """The leaderboard of a run.

    Attributes:
        folder: the run directory.
        board: the document of ``leaderboard.json``.
    """

    folder: Path
    board: dict[str, Any]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Contexts by forward KL, lowest first: name, kind, tokens, kl_forward, gold_nll, top1_agreement, …"""
        return self.board["contexts"]

    def __str__(self) -> str:
        lines = [f"{'context':24s} {'kind':5s} {'tokens':>6s} {'forward KL':>11s} {'top-1':>7s}"]
        for row in self.rows:
            kl, agreement = row["kl_forward"]["mean"], row["top1_agreement"]
            lines.append(f"{row['name']:24s} {row['kind']:5s} {row['tokens']:6d} {kl:11.4f} {agreement:7.1%}")
        return "\n".join(lines)


def optimize_context(
    template: TemplateLike,
    examples: Examples,
    *,
    base: str = "smollm2-135m",
    kind: str = "kv",
    tokens: int | None = None,
    out: str | Path | None = None,
    validation: Examples | None = None,
    settings: Mapping[str, Any] | None = None,
    **context: Any,
) -> LearnedContext:
    """Learn one soft prompt or KV cache that makes ``base`` behave as it does under ``template``.

    Args:
        template: text with ``{{slots}}``, or chat messages (``{"role", "content"}``).
        examples: rows with the slots' values and an ``output``, or a file of them; a part is set aside for scoring
            unless ``validation`` is given.
        base: the built-in model, a hub id, a folder, or a .gguf file.
        kind, tokens: kv or soft, and how many slots (default: as many as its starting text has tokens).
        out: the folder to work in, which must not hold the results of another call; default: ``runs/context-HASH``.
        settings: further sections of the config, as in YAML.
        context: further settings of the context: init, steps, learning_rate, batch_size, …

    Raises:
        InputError: something of this is wrong, in one line.
    """
    entry = {"name": f"{kind}-{tokens or 'all'}", "kind": kind, **({"tokens": tokens} if tokens else {}), **context}
    tree = _config(template, base, {"contexts": [entry], "mutations": {"count": 0}, **settings_of(settings)})
    with _run(tree, examples, validation, out, "context").opened() as run:
        (learned,) = run.learned([entry["name"]])
        score = run.score(learned)
        folder = run.directory / "contexts" / learned.name
    interval = score.kl_forward.ci95
    return LearnedContext(
        learned.name, learned.kind, learned.tokens, folder, score.kl_forward.mean, interval, score.to_json()
    )


def compare_contexts(
    template: TemplateLike,
    examples: Examples,
    *,
    base: str = "smollm2-135m",
    contexts: Sequence[Mapping[str, Any]] = (),
    mutations: int | Mapping[str, Any] = 8,
    out: str | Path | None = None,
    validation: Examples | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Comparison:
    """Learn ``contexts``, sample ``mutations`` of the text, and put all of them on one leaderboard.

    Args:
        contexts: as in the config: ``{"name", "kind", "tokens", "init", "steps", …}``, or ``{"text": FILE}`` for
            a wording of your own; a name is made where there is none.
        mutations: how many mutations by rules, or the config's whole section.
        out: as for :func:`optimize_context`; default: ``runs/comparison-HASH``.
        template, examples, base, validation, settings: as for :func:`optimize_context`.

    Raises:
        InputError: something of this is wrong, in one line.
    """
    if isinstance(contexts, str | Mapping) or not isinstance(contexts, Iterable):
        fix = 'such as [{"kind": "kv", "tokens": 32}]'
        raise InputError(f"must be a list, not {contexts!r}", where="contexts", fix=fix)
    mappings = [mapping(c, f"contexts.{i}", '{"kind": "kv", "tokens": 32}') for i, c in enumerate(contexts)]
    entries = [{"name": _default_name(c), **c} for c in mappings]
    section: Mapping[str, Any] = {"count": mutations, "generator": {"kind": "none"}}
    if not isinstance(mutations, int):
        section = mapping(mutations, "mutations", '8, or {"count": 8}')
    tree = _config(template, base, {"contexts": entries, "mutations": section, **settings_of(settings)})
    with _run(tree, examples, validation, out, "comparison").opened() as run:
        return Comparison(run.directory.path, run.run().to_json())


def export_context(
    context: str | Path, to: str, out: str | Path | None = None, *, base: str | None = None, **options: Any
) -> Path:
    """Write a context (a folder, or ``RUN#NAME``) for another tool; returns the folder written.

    ``to``, ``base`` and ``options`` (peft_type, block_size, partial_block, config) are those of ``kvopt export``.
    Raises InputError.
    """
    return Path(export(context, to, Path(out) if out else None, base=base, options=options)["folder"])


def _config(template: TemplateLike, base: str, sections: Mapping[str, Any]) -> dict[str, Any]:
    """The config's tree; ``model`` and ``data`` of the caller's sections are laid over ours."""
    tree: dict[str, Any] = {"model": {"base": base}, "data": {}, "template": template_section(template)}
    if isinstance(sections["contexts"], list | tuple):  # what is not a list of mappings, the config refuses
        placed = [_placed(entry) if isinstance(entry, Mapping) else entry for entry in sections["contexts"]]
        sections = {**sections, "contexts": placed}
    return laid_over(tree, sections)


def _default_name(context: Mapping[str, Any]) -> str:
    """``kv-32``, or for a wording of the caller's own its file's name."""
    if "text" in context:
        return Path(str(context["text"])).stem
    return f"{context.get('kind', 'kv')}-{context.get('tokens', 'all')}"


def _placed(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A context's settings with the path in its ``init`` or ``text`` taken from the current folder, as every path of a
    call is.
    """
    if entry.get("text") is not None:
        return {**entry, "text": str(Path(str(entry["text"])).resolve())}
    init = entry.get("init")
    for start in PLACES if isinstance(init, str) else ():
        path = Path(str(init).removeprefix(start))
        if str(init).startswith(start) and path.exists():
            return {**entry, "init": f"{start}{path.resolve()}"}
    return dict(entry)


def _run(
    tree: dict[str, Any], examples: Examples, validation: Examples | None, out: str | Path | None, what: str
) -> Run:
    """Write the config and the rows into the call's folder and open the run on them."""
    if not isinstance(examples, str | Path | Collection):
        raise InputError(f"must be rows or a file of them, not {examples!r}", where="examples")
    data = {"train": _rows(examples, "examples")}
    if validation is not None:
        data["validation"] = _rows(validation, "validation")
    if "limit" not in tree["data"] and not isinstance(examples, str | Path):
        tree["data"]["limit"] = {"selection": max(1, min(32, len(examples) // 4))}
    call = _name_of_call([what, _as_yaml(tree), {name: _content(rows) for name, rows in data.items()}, _files(tree)])
    folder = Path("runs") / f"{what}-{call}" if out is None else Path(out)
    _check_free(folder, call)
    for name, rows in data.items():
        file = "examples.jsonl" if name == "train" else "validation.jsonl"
        if not isinstance(rows, str):
            write_jsonl(folder / file, rows)
        tree["data"][name] = rows if isinstance(rows, str) else file
    write_text(folder / "kvopt.yaml", f"{OURS}{CALL}{call}\n{_as_yaml(tree)}")
    config, base_dir = load_config(folder / "kvopt.yaml")
    return Run(config, base_dir, folder / "run")


def _check_free(folder: Path, call: str) -> None:
    """Refuse a folder that no call wrote, or in which another call has results."""
    if not folder.exists():
        return
    config = folder / "kvopt.yaml"
    head = config.read_bytes()[:200].decode("utf-8", "replace") if config.is_file() else ""
    if not folder.is_dir() or (any(folder.iterdir()) and not head.startswith(OURS)):
        raise InputError("already exists and is not from such a call", where=str(folder), fix="choose another out")
    before = head.partition(CALL)[2].partition("\n")[0]
    if before not in ("", call) and (folder / "run" / "manifest.json").exists():
        fix = "choose another out, or leave it out: each call then has a folder of its own"
        raise InputError("holds the results of a call with other arguments", where=str(folder), fix=fix)


def _rows(rows: Examples, where: str) -> str | list[dict[str, Any]]:
    """The rows themselves, or where they are: a file's own place, or the name of a data set."""
    if isinstance(rows, Path):
        return str(rows.resolve())
    if isinstance(rows, str):
        return str(Path(rows).resolve()) if Path(rows).exists() else rows
    try:
        plain = [dict(row) for row in rows]
        canonical_json(plain)
    except (TypeError, ValueError) as error:
        raise InputError(f"rows must be mappings of plain values: {error}", where=where) from None
    return plain


def _content(rows: str | list[dict[str, Any]]) -> Any:
    """What rows are, for the name of a call: themselves, or their place with a hash of what is there."""
    return [rows, _sha256_of(Path(rows))] if isinstance(rows, str) else rows


def _files(tree: Mapping[str, Any]) -> list[str | None]:
    """Hashes of the files and folders that the contexts of a call name."""
    entries = tree["contexts"] if isinstance(tree["contexts"], list | tuple) else []
    known = [entry for entry in entries if isinstance(entry, Mapping)]
    named = [value for entry in known for value in (entry.get("text"), entry.get("init")) if isinstance(value, str)]
    return [_sha256_of(Path(value.partition(":")[2] or value)) for value in named]


def _sha256_of(path: Path) -> str | None:
    """Hash of a file, or of all files of a folder; None for neither."""
    if path.is_file():
        return sha256_file(path)
    if not path.is_dir():
        return None
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    return sha256_json([[str(file.relative_to(path)), sha256_file(file)] for file in files])


def _as_yaml(tree: Mapping[str, Any]) -> str:
    try:
        return yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True)
    except yaml.YAMLError as error:
        raise InputError(f"must be plain values: {' '.join(str(error).split())[:200]}", where="settings") from None


def _name_of_call(parts: Sequence[Any]) -> str:
    return sha256_json(parts)[:HASH_DIGITS]
