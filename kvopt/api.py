"""kvopt from Python, in one call each: learn a context for a template, compare learned with sampled contexts, export.

Every call works in a folder that the command line reads too: ``kvopt.yaml``, ``examples.jsonl`` and the run directory
``run/``. A second call with the same arguments finds everything done.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kvopt.config.document import load_config
from kvopt.errors import InputError
from kvopt.export.writing import export
from kvopt.run.run import Run
from kvopt.storage.files import write_jsonl, write_text

__all__ = ["Comparison", "LearnedContext", "compare_contexts", "export_context", "optimize_context"]

OURS = "# Written by a call of kvopt from Python; the next call in this folder writes it anew.\n"
PLACES = ("context:", "text:")  # beginnings of a context's init that go on with a path

TemplateLike = str | Sequence[Mapping[str, str]]
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
    out: str | Path = "runs/context",
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
        out: the folder to work in.
        settings: further sections of the config, as in YAML.
        context: further settings of the context: init, steps, learning_rate, batch_size, …

    Raises:
        InputError: something of this is wrong, in one line.
    """
    entry = {"name": f"{kind}-{tokens or 'all'}", "kind": kind, **({"tokens": tokens} if tokens else {}), **context}
    tree = _config(template, base, {"contexts": [entry], "mutations": {"count": 0}, **_settings(settings)})
    with _run(tree, examples, validation, Path(out)).opened() as run:
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
    out: str | Path = "runs/comparison",
    validation: Examples | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Comparison:
    """Learn ``contexts``, sample ``mutations`` of the text, and put all of them on one leaderboard.

    Args:
        contexts: as in the config: ``{"name", "kind", "tokens", "init", "steps", …}``, or ``{"text": FILE}`` for
            a wording of your own; a name is made where there is none.
        mutations: how many mutations by rules, or the config's whole section.
        template, examples, base, out, validation, settings: as for :func:`optimize_context`.

    Raises:
        InputError: something of this is wrong, in one line.
    """
    if isinstance(contexts, str | Mapping) or not isinstance(contexts, Iterable):
        fix = 'such as [{"kind": "kv", "tokens": 32}]'
        raise InputError(f"must be a list, not {contexts!r}", where="contexts", fix=fix)
    mappings = [_mapping(c, f"contexts.{i}", '{"kind": "kv", "tokens": 32}') for i, c in enumerate(contexts)]
    entries = [{"name": _default_name(c), **c} for c in mappings]
    section: Mapping[str, Any] = {"count": mutations, "generator": {"kind": "none"}}
    if not isinstance(mutations, int):
        section = _mapping(mutations, "mutations", '8, or {"count": 8}')
    tree = _config(template, base, {"contexts": entries, "mutations": section, **_settings(settings)})
    with _run(tree, examples, validation, Path(out)).opened() as run:
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
    tree: dict[str, Any] = {"model": {"base": base}, "data": {}}
    if isinstance(template, str):
        tree["template"] = {"text": template}
    elif isinstance(template, Sequence):
        example = '{"role": "user", "content": "…"}'
        tree["template"] = {"messages": [dict(_mapping(m, f"template.{i}", example)) for i, m in enumerate(template)]}
    else:
        raise InputError(f"must be text or chat messages, not {template!r}", where="template")
    if isinstance(sections["contexts"], list | tuple):  # what is not a list of mappings, the config refuses
        placed = [_placed(entry) if isinstance(entry, Mapping) else entry for entry in sections["contexts"]]
        sections = {**sections, "contexts": placed}
    for name, section in sections.items():
        if isinstance(section, Mapping) and isinstance(tree.get(name), dict):
            tree[name] |= section
        else:
            tree[name] = section
    return tree


def _settings(settings: Mapping[str, Any] | None) -> Mapping[str, Any]:
    return _mapping(settings or {}, "settings", '{"data": {"output": "label"}}')


def _mapping(value: object, where: str, example: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"must be a mapping, not {value!r}", where=where, fix=f"such as {example}")
    return value


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


def _run(tree: dict[str, Any], examples: Examples, validation: Examples | None, out: Path) -> Run:
    """Write the config and the rows into ``out`` and open the run on them."""
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or _is_ours(out / "kvopt.yaml"))):
        raise InputError("already exists and is not from such a call", where=str(out), fix="choose another out")
    if not isinstance(examples, str | Path | Collection):
        raise InputError(f"must be rows or a file of them, not {examples!r}", where="examples")
    write_text(out / "kvopt.yaml", OURS)  # first, so that a call that fails below can be put right and made again
    for name, rows in (("train", examples), ("validation", validation)):
        if rows is not None:
            tree["data"][name] = _stored(rows, out, "examples.jsonl" if name == "train" else "validation.jsonl")
    if "limit" not in tree["data"] and not isinstance(examples, str | Path):
        tree["data"]["limit"] = {"selection": max(1, min(32, len(examples) // 4))}
    write_text(out / "kvopt.yaml", OURS + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))
    config, base_dir = load_config(out / "kvopt.yaml")
    return Run(config, base_dir, out / "run")


def _is_ours(config: Path) -> bool:
    """Whether a config was written here; one of ``kvopt init`` or of a user's own is not written over."""
    return config.is_file() and config.read_bytes().startswith(OURS.encode())


def _stored(rows: Examples, out: Path, name: str) -> str:
    """Where the rows are, for the config: a file's own place, or the one they are written to."""
    if isinstance(rows, Path):
        return str(rows.resolve())
    if isinstance(rows, str):
        return str(Path(rows).resolve()) if Path(rows).exists() else rows
    try:
        write_jsonl(out / name, [dict(row) for row in rows])
    except (TypeError, ValueError) as error:
        what = f"rows must be mappings of plain values: {error}"
        raise InputError(what, where="validation" if name == "validation.jsonl" else "examples") from None
    return name
