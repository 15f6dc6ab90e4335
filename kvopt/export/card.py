"""The model card of an export: what it is, for which base, how good, how to use it."""

from __future__ import annotations

from typing import Any

from kvopt.base.builtin import HUB_ID
from kvopt.config.model import BUILTIN_BASE
from kvopt.console.tables import has_width
from kvopt.documents.part import BaseIdentity
from kvopt.errors import counted
from kvopt.export.export_format import Written
from kvopt.export.source import Source
from kvopt.version import VERSION

HASHES = ("weights", "config", "tokenizer", "chat_template")


def card(source: Source, to: str, written: Written) -> str:
    """The README.md of an export folder, with the front matter that the hub reads."""
    parts = [
        _front_matter(source, to, written),
        f"# {source.name}\n\n{written.summary}",
        _what_it_is(source),
        "## How good it is\n\n" + _metrics(source),
        f"## Use it\n\nFrom inside this folder:\n\n```python\n{written.snippet}```\n\n{_behind(source)}",
        f"## Serve it\n\nFrom inside this folder:\n\n```sh\n{written.commands}```" if written.commands else "",
        "## Know\n\n" + "\n".join(f"- {note}" for note in written.notes),
        f"Written by kvopt {VERSION} (`kvopt export --to {to}`).",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(source: Source, to: str, written: Written) -> str:
    base = HUB_ID if source.base_name == BUILTIN_BASE else source.base_name
    lines = ["---", f"library_name: {written.library}", f"base_model: {_quoted(base)}", "tags:"]
    lines += [f"- {tag}" for tag in ("kvopt", f"{source.kind}-context", to)]
    return "\n".join([*lines, "---"])


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _what_it_is(source: Source) -> str:
    rows: list[tuple[str, Any]] = [("kind", source.kind), ("slots", source.tokens), ("base", f"`{source.base_name}`")]
    record = source.record
    stored = (record and record.base) or BaseIdentity()
    rows += [(f"base {what}", f"`{value[:16]}…`") for what in HASHES if (value := getattr(stored, what))]
    if source.kind != "text" and not stored.weights:
        rows.append(("identity of the base", "unknown: kvopt did not make this context"))
    if record is not None:
        rows += [(what, f"`{value[:16]}…`") for what, key in _DATA if (value := getattr(record, key))]
        if record.settings:
            rows.append(
                ("learned", f"{counted(record.best_step or 0, 'step')} from `init: {record.settings.get('init')}`")
            )
        if record.origin:
            rows.append(("made by", f"`{record.origin.operation}`"))
    if source.template_tokens:
        rows.append(("stands for", f"{counted(source.template_tokens, 'token')} of the original template"))
    return "| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in rows if value is not None)


_DATA = (("template", "template_sha256"), ("data", "data_sha256"), ("content", "content_sha256"))


def _metrics(source: Source) -> str:
    metrics = source.metrics
    if not metrics:
        what = "text:template.json" if source.kind == "text" else "FOLDER"
        return f"Not measured. `kvopt score CONFIG --context {what}` measures it on a template and its data."
    kl = metrics.kl_forward
    interval = f" (95 % interval {kl.ci95[0]:.4f} to {kl.ci95[1]:.4f})" if kl.ci95 and has_width(kl.ci95) else ""
    lines = [f"On the {metrics.split} rows: forward KL {kl.mean:.4f} nats per gold token{interval}."]
    if metrics.gold_nll is not None:
        lines.append(f"Gold NLL {metrics.gold_nll:.4f}, top-1 agreement {metrics.top1_agreement:.1%}")
        lines[-1] += f", {metrics.examples} examples." if metrics.examples is not None else "."
    lines.append(
        "Forward KL is from the base under the original template to the base after this context; 0 is no difference."
    )
    if source.run is not None and source.run.board is not None:
        floor = source.run.board.noise_floor.kl_forward
        lines.append(f"Nothing below the noise floor, {floor:.1e}, means anything.")
    return " ".join(lines)


def _behind(source: Source) -> str:
    if source.kind == "text":
        return ""
    if (example := source.prompt_example()) is None:
        return "`body` is what stands after the context: the prompt from its first slot on, chat marks included."
    return (
        f"Tokenize the whole prompt, chat marks included, and drop its first {example.replaced} ids. Cut it as ids, not"
        " as text: a token may straddle the place."
    )
