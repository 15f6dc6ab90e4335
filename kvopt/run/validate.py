"""``kvopt validate``: everything that can be checked without the model's weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvopt.base.devices import choose_device
from kvopt.base.loading import load_tokenizer
from kvopt.config.contexts import ContextConfig
from kvopt.errors import InputError, counted
from kvopt.mutate.literals import needed_literals
from kvopt.mutate.spans import compile_protect
from kvopt.run.inputs import Inputs
from kvopt.task.prompt_check import nothing_to_learn, prompt_warnings, start_ids
from kvopt.task.seam import Encoded, Encoder
from kvopt.task.template_files import template_from_file

LONGEST_QUOTE = 160  # characters of a text that is shown


def check(inputs: Inputs) -> dict[str, Any]:
    """Place the seam on every row of the template and data that were read, and say what there is. Raises InputError for
    the first fault.
    """
    config, template, dataset = inputs.config, inputs.template, inputs.dataset
    if config.model.device not in ("auto", "cpu"):
        choose_device(config.model.device)
    tokenizer, window = load_tokenizer(config.model)
    encoder = Encoder.of(tokenizer, config.template)
    encoded = encoder.encode(template, inputs.examples, window=window)
    warnings = [*inputs.warnings, *prompt_warnings(encoder, template, inputs.examples, encoded)]
    if fault := nothing_to_learn(encoder, template, encoded, config.template.scope):
        if config.learned:
            raise fault
        warnings.append(str(fault))
    longest = max(len(encoded.prefix) + len(row) for row in encoded.rows)
    scored = (*dataset.selection, *dataset.validation)
    for wording in inputs.written.values():
        gold = {row.example_id: row.gold for row in encoded.rows}
        encoder.encode(wording, scored, gold={e.id: gold[e.id] for e in scored}, window=window)
    generator = config.mutations.generator
    if generator.kind == "extract":
        for tokens in generator.tokens:
            check_length(tokens, len(encoded.prefix), "mutations.generator.tokens")
    for item in config.frontiers:
        check_length(item.tokens[0], len(encoded.prefix), f"contexts.{item.name}.tokens")
    starts = _Starts(inputs, encoder, encoded, window)
    for context in config.learned:
        starts.check(context)
    return {
        "template": "chat messages" if template.is_chat else "text",
        "slots": list(template.slots),
        "context_tokens": len(encoded.prefix),
        "rows": {split: len(getattr(dataset, split)) for split in ("train", "selection", "validation")},
        "gold_tokens": encoded.gold_tokens,
        "longest_row_tokens": longest,
        "context_window": window,
        "context_ends_with": tokenizer.decode(encoded.prefix[-8:]),
        "first_body": tokenizer.decode(encoded.rows[0].body),
        "first_gold": tokenizer.decode(encoded.rows[0].gold),
        "literals": [literal.text for literal in needed_literals(template, compile_protect(config.mutations.protect))],
        "warnings": warnings,
    }


def check_length(tokens: int, whole: int, where: str) -> None:
    """Raises InputError where a text of so many tokens would not be shorter than a template of ``whole``."""
    if tokens >= whole:
        raise InputError(
            f"{counted(tokens, 'token')} wanted, the template has {whole}", where=where, fix="ask for fewer"
        )


def report_text(report: dict[str, Any]) -> str:
    """What :func:`check` found, as lines for people; the last one is OK."""
    rows, slots = report["rows"], report["slots"]
    longest, window = report["longest_row_tokens"], report["context_window"]
    per_row = report["gold_tokens"] / sum(rows.values())
    lines = [
        f"template: {report['template']} with {counted(len(slots), 'slot')} ({', '.join(slots)});"
        f" {counted(report['context_tokens'], 'token')} stand before the first slot, and contexts replace them",
        f"rows: {rows['train']} to train on, {rows['selection']} to choose by, {rows['validation']} to report on;"
        f" {report['gold_tokens']:,} gold tokens, {per_row:.1f} a row",
        f"window: the longest row takes {longest:,} of {window:,} tokens ({longest / window:.0%})",
        f"context ends with {_quoted(report['context_ends_with'])}",
        f"first body: {_quoted(report['first_body'])}",
        f"first gold: {_quoted(report['first_gold'])}",
        f"literals that other wordings must keep: {', '.join(map(_quoted, report['literals'])) or 'none'}",
        "OK",
    ]
    return "\n".join(lines)


def _quoted(text: str) -> str:
    """Text on one line, its middle left out where it is long."""
    return repr(text if len(text) <= LONGEST_QUOTE else f"{text[: LONGEST_QUOTE // 2]} … {text[-LONGEST_QUOTE // 2 :]}")


@dataclass(frozen=True)
class _Starts:
    """Checks where each learned context starts and whether its slots fit."""

    inputs: Inputs
    encoder: Encoder
    encoded: Encoded
    window: int

    def check(self, context: ContextConfig) -> None:
        """Raises InputError when there is no such start, or it is too short or the window too small for the slots."""
        where = f"contexts.{context.name}"
        available = self._tokens_of(context, where)
        slots = context.tokens or available or 0
        if available is not None and slots > available:
            raise InputError(
                f"{counted(slots, 'slot')} wanted, the text to start from has {counted(available, 'token')}",
                where=f"{where}.tokens",
                fix="lower tokens, start from a longer text, or use init: random-text",
            )
        longest = max(len(row) for row in self.encoded.rows)
        if slots + longest > self.window:
            raise InputError(
                f"{counted(slots, 'slot')} and the longest row ({counted(longest, 'token')}) do not fit the window of"
                f" {self.window} tokens",
                where=f"{where}.tokens",
                fix=f"at most {self.window - longest} fit",
            )

    def _tokens_of(self, context: ContextConfig, where: str) -> int | None:
        """Tokens of the text that a context starts from; None where only a run can say, or any number goes."""
        kind, argument = context.start.kind, context.start.argument
        if kind == "context" and argument not in self.inputs.context_names:
            if not (self.inputs.base_dir / argument).is_dir():
                raise InputError(f"init {context.init!r}: no such context or folder", where=where)
            return None
        if kind in ("best-mutation", "mutation") and self.inputs.config.mutations.count == 0:
            raise InputError(f"init {context.init!r} needs mutations", where=where, fix="raise mutations.count")
        if kind == "text":
            template = template_from_file(self.inputs.base_dir / argument, self.inputs.template)
            probes = self.inputs.dataset.selection[:4] or self.inputs.dataset.train[:4]
            return len(self.encoder.encode(template, probes).prefix)
        section = self.inputs.config.template
        whole = len(start_ids(self.encoder, self.inputs.template, self.encoded, section.scope))
        if (text := context.start.text) is not None:
            check_length(text.tokens, whole, f"{where}.init")
            return text.tokens
        return whole if kind in ("template", "strided", "matched", "salient") else None
