"""Orders of mutations, whose first K are chosen: ``best-mutations:K``, ``diverse-mutations:K``, ``random-mutations:K``;
and ``spread-mutations:K``, evenly over all from the lowest KL to the highest.

The mutations of lowest KL are often those that changed least, and students of near-copies of one wording learn that
wording. *diverse* therefore looks among the better half by KL for the mutation whose text is farthest from the original
and from all that stand before it, again and again: greedy k-center (Gonzalez, 1985), at most twice the covering radius
of the best K of that half. Every order but *spread* gives nested sets: the first K are a part of the first K + 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import TypeVar

import torch

from kvopt.config.names import Order
from kvopt.errors import InputError, counted
from kvopt.mutate.mutation import Mutation
from kvopt.task.template import Template

T = TypeVar("T")
WORD = re.compile(r"\w+|[^\w\s]|\n+")


def first_mutations(
    order: Order,
    count: int,
    accepted: Mapping[str, Template],
    ranked: Callable[[], Sequence[str]],
    original: Template,
    *,
    seed: int,
    taken: Collection[str] = (),
    where: str,
    whole: bool = False,
) -> list[str]:
    """Names of the first ``count`` mutations of an order.

    Args:
        accepted: the accepted mutations by name, in the order of their names.
        ranked: gives their names by forward KL, lowest first; called where the order needs it.
        original: the template that they are mutations of.
        seed: of the order *random*.
        taken: what *diverse*, *spread* and *random* leave out.
        whole: *diverse* looks at all that are ranked, not at the better half.

    Raises:
        InputError: there are fewer.
    """
    if order == "random":
        names = in_seeded_order([name for name in accepted if name not in taken], seed)
    elif order == "diverse":
        free = [(name, accepted[name]) for name in ranked() if name not in taken]
        names = diverse_order(original, free, count, len(free) if whole else None)
    elif order == "spread":
        names = spread_order([name for name in ranked() if name not in taken], count)
    else:
        names = list(ranked())
    if len(names) < count:
        wanted, there = ("is" if number == 1 else "are" for number in (count, len(names)))
        what = f"{counted(count, 'mutation')} {wanted} wanted, but there {there} only {len(names)}"
        raise InputError(what, where=where, fix="raise mutations.count and run again")
    return names[:count]


def in_seeded_order(items: Sequence[T], seed: int) -> list[T]:
    """All items in an order that the seed decides: the first K are a part of the first K + 1."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))
    return [items[i] for i in order.tolist()]


def spread_order(ranked: Sequence[T], count: int) -> list[T]:
    """One from the middle of each of ``count`` equal parts of ``ranked``, or all where there are fewer."""
    if count >= len(ranked):
        return list(ranked)
    return [ranked[(2 * i + 1) * len(ranked) // (2 * count)] for i in range(count)]


def diverse_order(
    original: Template, ranked: Sequence[tuple[str, Template]], count: int, among: int | None = None
) -> list[str]:
    """The first ``count`` names of a greedy k-center order over the first ``among`` of ``ranked``, the original being
    the first center; then, where ``count`` is larger than that, the others in the order of ``ranked``.

    Args:
        ranked: (name, template) by forward KL, lowest first; of equal distances the earlier one is taken.
        among: default: the better half.
    """
    better = ranked[: (len(ranked) + 1) // 2 if among is None else among]
    pairs, first = [word_pairs(template) for _, template in better], word_pairs(original)
    nearest = [text_distance(own, first) for own in pairs]  # to the original or what is chosen
    chosen: list[int] = []
    while len(chosen) < min(count, len(better)):
        farthest = max((i for i in range(len(better)) if i not in chosen), key=lambda i: nearest[i])
        chosen.append(farthest)
        nearest = [min(d, text_distance(own, pairs[farthest])) for d, own in zip(nearest, pairs, strict=True)]
    others = [name for name, _ in ranked[len(better) :]]
    return [better[i][0] for i in chosen] + others[: max(0, count - len(chosen))]


def wordings_report(template: Template, tried: Sequence[Mutation], bought: Mapping[str, int]) -> str | None:
    """How far the accepted paraphrases are from the template and from each other, and what an endpoint counted for them
    in this command; None without any.
    """
    wordings = [m.template for m in tried if m.accepted and m.family == "paraphrase" and m.template is not None]
    if not wordings:
        return None
    middle = [
        f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})" for values in distances(template, wordings)
    ]
    price = ""
    if bought:
        read, written = (bought.get(name, 0) for name in ("prompt_tokens", "completion_tokens"))
        price = f"; bought now: {read:,} tokens in, {written:,} out"
    words = "share of neighbouring words that differ, median and range"
    nearest = f", from the nearest other one {middle[1]}" if len(wordings) > 1 else ""
    return f"paraphrases: from the template {middle[0]}{nearest} ({words}){price}"


def distances(original: Template, wordings: Sequence[Template]) -> tuple[list[float], list[float]]:
    """:func:`text_distance` of each wording from the original, and from the nearest of the others."""
    first, pairs = word_pairs(original), [word_pairs(one) for one in wordings]
    nearest = [
        min((text_distance(own, other) for j, other in enumerate(pairs) if j != i), default=1.0)
        for i, own in enumerate(pairs)
    ]
    return [text_distance(own, first) for own in pairs], nearest


def word_pairs(template: Template) -> frozenset[tuple[str, str]]:
    """Neighbouring words, marks and line ends of each field."""
    pairs: set[tuple[str, str]] = set()
    for field in template.fields:
        words = ["", *WORD.findall(field), ""]
        pairs.update(pairwise(words))
    return frozenset(pairs)


def text_distance(a: frozenset[tuple[str, str]], b: frozenset[tuple[str, str]]) -> float:
    """1 − resemblance of two wordings by their :func:`word_pairs` (Broder, 1997, with pairs of words as shingles): the
    share of their different pairs that only one of them has. 0 for the same words in the same order, 1 for no pair in
    common; a metric.
    """
    return 1 - len(a & b) / len(a | b) if a or b else 0.0
