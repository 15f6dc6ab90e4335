"""Shortened texts at equal lengths, by the exact forward KL on the same validation rows.

    python tools/compare_shortening.py CONFIG.yaml --run RUN --tokens 122 82 41 [--texts llmlingua.json]

Compared are the texts that ``kvopt shorten`` left in RUN, the texts of a JSON file (a list of ``{"how", "text"}``, as
tools/llmlingua_texts.py writes it), texts written by hand, and four simple rules computed here:

- attention: the tokens with the largest attention weight from the rows' bodies;
- self-information: the tokens that the base finds hardest to predict, the rule of selective-context 0.1.4 (which itself
  needs a spaCy model that no package registry has);
- sentences: the first, the last and evenly spread sentences and list items, as many as fit;
- random: tokens drawn at random, three draws.

Of the texts of one kind that are at most so long, the one with the lowest KL counts: rivals get their best setting on
the rows that are reported, which kvopt does not.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from kvopt.config.document import load_config
from kvopt.documents.shortened_file import SHORTENED
from kvopt.errors import InputError
from kvopt.run.encoded_task import EncodedTask
from kvopt.run.run import Run
from kvopt.shorten.importance import largest_attention
from kvopt.shorten.pieces import Pieces, take_apart
from kvopt.task.template import SLOT, Template
from kvopt.task.template_files import template_from_file


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--run", type=Path, required=True, help="the run directory of kvopt shorten")
    parser.add_argument("--tokens", type=int, nargs="+", required=True)
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help="JSON files with texts of other tools")
    parser.add_argument("--hand", type=Path, nargs="*", default=[], help="wordings written by hand")
    parser.add_argument("--set", action="append", default=[], dest="sets")
    options = parser.parse_args()
    config, base_dir = load_config(options.config, options.sets)
    with Run(config, base_dir, options.run).opened() as run:
        compare(run, options.tokens, options.texts, options.hand)


def compare(run: Run, lengths: Sequence[int], files: Sequence[Path], hand: Sequence[Path]) -> None:
    task = run.task()
    pieces = take_apart(task.template, task.dataset.train[0], task.encoder, task.encoded.prefix)
    found: dict[str, list[tuple[str, Template]]] = {"kvopt shorten": _shortened(task, run)}
    for path in files:
        texts = [
            (entry["how"], _with_text(task.template, entry["text"])) for entry in json.loads(path.read_text("utf-8"))
        ]
        found[path.stem] = texts
    for path in hand:
        found[f"by hand ({path.stem})"] = [(str(path), template_from_file(path, task.template))]
    for rule, order in _rules(task, pieces).items():
        found[rule] = [(f"{n} tokens", t) for n in lengths if (t := _first_that_fit(task, pieces, order, n))]
    scored: dict[str, list[tuple[int, float]]] = {}
    for kind, texts in found.items():
        for how, template in texts:
            try:
                context = task.text_context(how.replace("/", "-"), template)
            except InputError as error:
                print(f"left out: {kind}, {how}: {error}")
                continue
            if context.tokens <= max(lengths):
                scored.setdefault(kind, []).append((context.tokens, run.score(context).kl_forward.mean))
    none = run.score(task.none).kl_forward.mean
    print(f"\n{len(task.dataset.validation)} validation rows; template {len(pieces.prefix)} tokens; none {none:.4f}\n")
    print("| text | " + " | ".join(f"≤ {n}" for n in lengths) + " |")
    print("|---|" + "---|" * len(lengths))
    for kind, values in scored.items():
        cells = []
        for n in lengths:
            fit = [(kl, tokens) for tokens, kl in values if tokens <= n]
            cells.append(f"{min(fit)[0]:.4f} ({min(fit)[1]})" if fit else "–")
        print(f"| {kind} | " + " | ".join(cells) + " |")


def _shortened(task: EncodedTask, run: Run) -> list[tuple[str, Template]]:
    paths = sorted((run.directory / SHORTENED).glob("*.yaml"))
    return [(path.stem, template_from_file(path, task.template)) for path in paths]


def _with_text(template: Template, text: str) -> Template:
    """The template with ``text`` in place of its longest static message."""
    fields = list(template.fields)
    place = max((i for i, field in enumerate(fields) if not SLOT.search(field)), key=lambda i: len(fields[i]))
    fields[place] = text
    return template.with_fields(fields)


def _rules(task: EncodedTask, pieces: Pieces) -> dict[str, list[list[int]]]:
    """For each rule, units of pieces in the order in which they are taken in."""
    base, ids = task.base, list(pieces.prefix)
    attention = largest_attention(base, ids, task.rows("train").rows[:32])
    with torch.no_grad():
        hidden = base.backbone(input_ids=torch.tensor([ids], device=base.device)).last_hidden_state[0]
        log_p = base.head.logits(hidden).log_softmax(-1).cpu()
    information = torch.zeros(len(ids))
    information[1:] = -log_p[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]

    def by(values: torch.Tensor) -> list[list[int]]:
        worth = [float(values[list(tokens)].max()) for tokens in pieces.tokens]
        return [[i] for i in sorted(range(len(pieces)), key=lambda i: -worth[i])]

    sentences = [list(unit.pieces) for unit in pieces.at("sentence")]
    spread = sorted(range(len(sentences)), key=lambda i: (_rounds(i, len(sentences)), i))
    draws = {}
    for seed in range(3):
        order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed)).tolist()
        draws[f"random {seed}"] = [[i] for i in order]
    return {
        "attention": by(attention),
        "self-information": by(information),
        "sentences": [sentences[i] for i in spread],
        **draws,
    }


def _rounds(place: int, count: int) -> int:
    """In which halving of a row of ``count`` a place comes up: both ends first, then the middle, …"""
    if place in (0, count - 1):
        return 0
    step, number = (count - 1) / 2, 1
    while step >= 0.5:
        if any(round(step * k) == place for k in range(1, 2**number)):
            return number
        step, number = step / 2, number + 1
    return number


def _first_that_fit(task: EncodedTask, pieces: Pieces, order: Sequence[list[int]], tokens: int) -> Template | None:
    """The template with as many units, in their order, as stay within so many tokens."""
    kept: set[int] = set()
    for unit in order:
        wanted = kept | set(unit)
        try:
            length = len(task.encoder.encode(pieces.written(wanted), task.dataset.selection[:2]).prefix)
        except InputError:
            continue
        if length <= tokens:
            kept = wanted
    return pieces.written(kept) if kept else None


if __name__ == "__main__":
    main()
