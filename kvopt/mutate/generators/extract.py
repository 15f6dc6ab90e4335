"""The template itself, shortened to each of the lengths that were asked for, longest first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvopt.mutate.proposals import Proposal, Request
from kvopt.task.template import Template


class Extracts:
    """Shortened texts.

    Args:
        lengths: in tokens, falling.
        shorten: the best text of at most so many tokens, given the one that it made before.
    """

    name = "extract"
    family = "extract"
    batch = 1

    def __init__(self, lengths: Sequence[int], shorten: Callable[[int], Template]) -> None:
        self._lengths, self._shorten = lengths, shorten
        self._texts: list[Template] = []
        self.limit: int | None = len(lengths)

    def propose(self, requests: Sequence[Request]) -> list[Proposal]:
        return [self._one(request.turn) for request in requests]

    def _one(self, turn: int) -> Proposal:
        while len(self._texts) <= turn:
            self._texts.append(self._shorten(self._lengths[len(self._texts)]))
        length = self._lengths[turn]
        return Proposal(
            self._texts[turn], detail=f"at most {length} tokens", operators=(f"extract-{length}",), cut=True
        )
