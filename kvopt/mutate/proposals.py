"""What a paraphraser is asked and what it answers, and the markers that stand for protected spans while a model sees
the text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvopt.mutate.spans import MARK, Field, mask
from kvopt.mutate.validity import Rejection, Scope, editable_lengths
from kvopt.task.template import Template

Complete = Callable[[list[list[dict[str, str]]], int, int, float], list[str]]
"""``complete(prompts, seed, max_tokens, temperature)``: one continuation for each list of chat messages, the same ones
for the same arguments.
"""


@dataclass(frozen=True)
class Request:
    """One paraphrase of ``template`` is wanted.

    Attributes:
        template: what to rewrite.
        scope: which static text may change.
        protect: the user's literals.
        seed: of this attempt.
        run_seed: of the whole search.
        turn: how many paraphrases were asked for before this one.
        accepted: the mutations that are there already, oldest first.
    """

    template: Template
    scope: Scope
    protect: tuple[re.Pattern[str], ...]
    seed: int
    run_seed: int
    turn: int
    accepted: tuple[Template, ...] = ()

    @property
    def fields(self) -> list[Field]:
        """The template's fields, masked."""
        lengths = editable_lengths(self.template, self.scope)
        return [mask(s, n, self.protect) for s, n in zip(self.template.fields, lengths, strict=True)]


@dataclass(frozen=True)
class Proposal:
    """A candidate, or why there is none.

    Attributes:
        detail: how it was made.
        operators: what the lineage says was done; default: the generator's name.
        cut: text was only cut, and what must stay is there: literals and messages may be fewer.
        written: the whole wording was written anew, with a layout of its own.
    """

    template: Template | None = None
    rejection: Rejection | None = None
    detail: str = ""
    operators: tuple[str, ...] = ()
    cut: bool = False
    written: bool = False


class Generator(Protocol):
    """A source of paraphrases.

    Attributes:
        name: what the lineage calls it.
        family: of what it makes, in the lineage.
        batch: how many requests it likes at once; 1 when the result would depend on the batch.
        limit: how many turns it can serve at all, None without an end.
    """

    name: str
    family: str
    batch: int
    limit: int | None

    def propose(self, requests: Sequence[Request]) -> list[Proposal]:
        """One proposal for each request, in order; failures are proposals with a rejection, never exceptions."""
        ...


@dataclass(frozen=True)
class Marked:
    """A masked text with readable markers (``[K1]``) in the place of its marks."""

    text: str
    markers: dict[str, str]

    def restore(self, answer: str) -> str | Rejection:
        """The masked form of a model's answer, or why it is refused: each marker must be there exactly once, in any
        order.
        """
        counts = Counter(re.findall(r"\[K\d+\]", answer))
        for marker in self.markers:
            if counts[marker] != 1:
                return Rejection("lost-marker" if not counts[marker] else "duplicated-marker", marker)
        if len(counts) > len(self.markers):
            return Rejection("invented-marker", next(m for m in counts if m not in self.markers))
        if re.search(MARK, answer):
            return Rejection("invented-marker", "a private-use character")
        for marker, mark in self.markers.items():
            answer = answer.replace(marker, mark)
        return answer


def marked(masked: str) -> Marked:
    """Put markers in the place of marks. Digits are always masked, so the text itself holds no such marker."""
    markers = {f"[K{i + 1}]": mark for i, mark in enumerate(re.findall(MARK, masked))}
    text = masked
    for marker, mark in markers.items():
        text = text.replace(mark, marker)
    return Marked(text, markers)
