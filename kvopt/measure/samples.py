"""What single examples show: per-token KL over the gold output, the tokens each context would rather say, and greedy
answers, for the worst, the median and the best validation example. The report needs no model because of it.

Symbols: p the base under the original template, q the base after another context, G gold tokens of one example.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from kvopt.base.generate import answer_text, generate
from kvopt.base.loading import Base
from kvopt.base.prefix import Prefix, gold_hidden
from kvopt.contexts import Context, NoContext
from kvopt.documents.leaderboard_file import NamedContext
from kvopt.documents.samples_file import (
    ContextTokens,
    LikelyToken,
    ReferenceTokens,
    SampledExample,
    SamplesDocument,
)
from kvopt.kernels import Head
from kvopt.measure.reference import Reference
from kvopt.measure.score import TokenScores
from kvopt.task.examples import Example
from kvopt.task.seam import Encoded, make_batch

SAMPLES_VERSION = 1
"""Raise it when the same inputs give other samples."""
GOLD_LIMIT = 128  # gold tokens of an example that are shown
DIGITS = 6
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Shown:
    """A context of the report with its bodies and per-token scores on the validation rows, and the answers that the
    first of these rows have already, if any.
    """

    context: Context
    bodies: Encoded
    scores: TokenScores
    answers: Sequence[str] = ()


@dataclass(frozen=True)
class SampleLimits:
    """``examples``: how many; ``top_k``: tokens listed at a place; ``max_new_tokens``: where answers are cut."""

    examples: int
    top_k: int
    max_new_tokens: int


def ordering(shown: Sequence[Shown]) -> np.ndarray:
    """Validation rows from the worst to the best: by the mean, over contexts, of the rank of a row's KL per token.

    Ranks, so that one bad context does not decide alone; equal rows keep their order.
    """
    ranks = [rankdata((s.scores.by_example(s.scores.kl) / s.scores.counts).numpy()) for s in shown]
    return np.argsort(-np.mean(ranks, axis=0), kind="stable")


def places(count: int, rows: int) -> list[tuple[int, str]]:
    """``count`` evenly spread positions in an ordering of ``rows``, each with its name; the worst comes first."""
    count = min(count, rows)
    if count == 1:
        return [(0, "worst")]
    spots = [round(i * (rows - 1) / (count - 1)) for i in range(count)]
    names = {0: "worst", rows - 1: "best"} | ({spots[count // 2]: "median"} if count % 2 else {})
    return [(spot, names.get(spot, f"{1 - spot / (rows - 1):.0%} of rows are better")) for spot in spots]


def collect(
    base: Base,
    reference: Reference,
    original: Shown,
    others: Sequence[Shown],
    examples: Sequence[Example],
    limits: SampleLimits,
    *,
    stop: frozenset[int],
    progress: Progress | None = None,
) -> SamplesDocument:
    """The document of ``samples.json``, without its key.

    Args:
        base: the frozen model.
        reference: holds the validation rows.
        original: the original template; only its answers are new.
        others: what is shown beside it; all of them but "no context" decide which examples are the worst and the best.
        examples: the validation rows, in the order of ``original.bodies``.
        limits: how much of everything.
        stop: ids that end an answer.
        progress: called with the number of contexts finished.
    """
    ranking = [s for s in others if not isinstance(s.context, NoContext)] or list(others)
    order = ordering(ranking)
    chosen = [(int(order[spot]), name) for spot, name in places(limits.examples, len(order))]
    rows = [index for index, _ in chosen]
    gold = [original.bodies.rows[index].gold for index in rows]
    head = base.head
    stored = [reference.hidden([examples[index].id]).to(base.device) for index in rows]
    p = [_top(head, hidden, ids, limits.top_k) for hidden, ids in zip(stored, gold, strict=True)]
    sampled = [
        SampledExample(
            id=examples[index].id,
            place=name,
            values=dict(examples[index].values),
            output=examples[index].output,
            gold=[token_text(base, token) for token in ids[:GOLD_LIMIT]],
            gold_tokens=len(ids),
            reference=ReferenceTokens(nll=nll, top=[likely_tokens(base, row) for row in top]),
            contexts={},
        )
        for (index, name), ids, (nll, top) in zip(chosen, gold, p, strict=True)
    ]
    for shown in (original, *others):
        with torch.no_grad():
            prefix = shown.context.prefix(base)
        if max(rows, default=0) < len(shown.answers):
            answers: list[str | None] = [shown.answers[index] for index in rows]
        else:
            answers = _answers(base, prefix, shown.bodies, rows, limits.max_new_tokens, stop)
        tops = [None] * len(rows) if shown is original else _would_say(base, prefix, shown, rows, head, limits.top_k)
        for example, index, answer, top in zip(sampled, rows, answers, tops, strict=True):
            example.contexts[shown.context.name] = _of_row(base, shown.scores, index, answer, top)
        if progress:
            progress(1)
    return SamplesDocument(
        split="validation",
        contexts=[
            NamedContext(name=s.context.name, kind=s.context.kind, tokens=s.context.tokens) for s in (original, *others)
        ],
        ranked_by=[s.context.name for s in ranking],
        rows=len(order),
        max_new_tokens=limits.max_new_tokens,
        examples=sampled,
    )


Top = list[tuple[int, float]]


def _of_row(
    base: Base, scores: TokenScores, index: int, answer: str | None, top: Sequence[Top | None] | None
) -> ContextTokens:
    """What ``samples.json`` holds of one context on one example."""
    start = int(scores.counts[:index].sum())
    part = slice(start, start + min(int(scores.counts[index]), GOLD_LIMIT))
    tokens = ContextTokens(
        kl=[round(v, DIGITS) for v in scores.kl[part].tolist()],
        nll=[round(v, DIGITS) for v in scores.nll[part].tolist()],
        agree=scores.agree[part].tolist(),
        answer=answer,
    )
    if top is not None:
        tokens.top = [None if row is None else likely_tokens(base, row) for row in top]
    return tokens


def _would_say(
    base: Base, prefix: Prefix, shown: Shown, rows: Sequence[int], head: Head, top_k: int
) -> list[list[Top | None]]:
    """For each row, the most likely tokens of q at each gold token where its first is not the reference's."""
    likeliest = []
    for index in rows:
        batch = make_batch(shown.bodies.rows, [index]).to(base.device)
        with torch.no_grad():
            hidden = gold_hidden(base, prefix, batch)
        start = int(shown.scores.counts[:index].sum())
        agree = shown.scores.agree[start : start + len(hidden)].tolist()
        _, top = _top(head, hidden, batch.gold.tolist(), top_k)
        likeliest.append([None if same else row for same, row in zip(agree, top, strict=False)])
    return likeliest


@torch.no_grad()
def _top(head: Head, hidden: Tensor, gold: Sequence[int], top_k: int) -> tuple[list[float], list[Top]]:
    """−log probability of each gold token, and the ``top_k`` likeliest (id, probability) at each, of hidden [G, D]."""
    log_q = head.logits(hidden[:GOLD_LIMIT]).log_softmax(-1)
    ids = torch.tensor(gold[:GOLD_LIMIT], device=log_q.device)
    nll = -log_q.gather(1, ids[:, None])[:, 0]
    values, tokens = log_q.topk(min(top_k, log_q.shape[-1]), dim=-1)
    pairs = zip(tokens.tolist(), values.exp().tolist(), strict=True)
    return [round(v, DIGITS) for v in nll.tolist()], [list(zip(t, v, strict=True)) for t, v in pairs]


def _answers(
    base: Base, prefix: Prefix, bodies: Encoded, rows: Sequence[int], limit: int, stop: frozenset[int]
) -> list[str | None]:
    """A greedy answer for each row, as long as the window lets it be; None where there is no room for one."""
    chosen = [bodies.rows[index].body for index in rows]
    room = base.geometry.window - len(prefix) - max(map(len, chosen))
    if room < 1:
        return [None] * len(rows)
    answers = generate(base, prefix, chosen, max_new_tokens=min(limit, room), stop=stop)
    return [answer_text(base, ids) for ids in answers]


def likely_tokens(base: Base, row: Top) -> list[LikelyToken]:
    return [LikelyToken(token=token_text(base, token), p=round(p, DIGITS)) for token, p in row]


def token_text(base: Base, token: int) -> str:
    """The text that a token adds after another, its leading space kept; control tokens by their name."""
    tokenizer = base.tokenizer
    if token in set(tokenizer.all_special_ids):
        return str(tokenizer.convert_ids_to_tokens(token))
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    before, both = (tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (anchor, [*anchor, token]))
    text = both[len(before) :] if both.startswith(before) else ""
    return text or str(tokenizer.convert_ids_to_tokens(token) or tokenizer.decode([token]))
