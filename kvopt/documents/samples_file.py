"""``samples.json``: single validation examples, token by token, under the contexts that the report shows."""

from __future__ import annotations

from collections.abc import Sized
from typing import Annotated

from pydantic import Field, model_validator

from kvopt.documents.leaderboard_file import NamedContext
from kvopt.documents.part import DocumentPart, StandsOn


class LikelyToken(DocumentPart):
    """A token that a model might say at one place."""

    token: str = Field(description="its text, with its leading space")
    p: float = Field(description="its probability, 0 to 1")


LikelyTokens = Annotated[list[LikelyToken], Field(min_length=1)]
"""The likeliest tokens at one place, the likeliest first."""


class ReferenceTokens(DocumentPart):
    """What the base under the original template says of one example, by gold token."""

    nll: list[float] = Field(description="−log probability of each gold token, in nats")
    top: list[LikelyTokens] = Field(description="the likeliest tokens at each gold token")


class ContextTokens(DocumentPart):
    """What the base after one context says of one example, by gold token."""

    kl: list[float] = Field(description="forward KL at each gold token, in nats")
    nll: list[float] = Field(description="−log probability of each gold token, in nats")
    agree: list[bool] = Field(description="whether the most likely token is that of the original template")
    answer: str | None = Field(None, description="the greedy answer; null where the window has no room for one")
    top: list[LikelyTokens | None] | None = Field(
        None, description="the likeliest tokens where the first is not that of the original, null elsewhere"
    )


class SampledExample(DocumentPart):
    """One validation example under every context that is shown."""

    id: str = Field(description="of the example")
    place: str = Field(description="worst, median, best, or how many rows are better")
    values: dict[str, str] = Field(description="the values of the template's slots")
    output: str = Field(description="the gold output")
    gold: list[str] = Field(description="text of the gold tokens that are shown")
    gold_tokens: int = Field(description="gold tokens of the example, shown or not")
    reference: ReferenceTokens
    contexts: dict[str, ContextTokens] = Field(description="by the context's name")


class SamplesDocument(DocumentPart):
    """``samples.json``: single validation examples, token by token, under the contexts that the report shows."""

    key: str = Field("", description="hash of everything that the samples depend on")
    split: str = Field("validation", description="where the examples are from")
    contexts: list[NamedContext] = Field(description="what is shown; the original is the first")
    ranked_by: list[str] = Field(description="names of the contexts that decide which examples are the worst")
    rows: int = Field(description="validation rows that were ranked")
    max_new_tokens: int = Field(0, description="where greedy answers are cut, in tokens")
    examples: list[SampledExample] = Field(description="from the worst to the best")
    stands_on: StandsOn | None = Field(None, description="what it was measured on; absent in old files")

    @model_validator(mode="after")
    def _fits_together(self) -> SamplesDocument:
        names = {context.name for context in self.contexts}
        if not self.contexts:
            raise ValueError("no contexts")
        for example in self.examples:
            if not names <= set(example.contexts):
                raise ValueError(f"{example.id} lacks {', '.join(sorted(names - set(example.contexts)))}")
            shown = [example.contexts[name] for name in names]
            by_token: list[Sized] = [example.reference.nll, example.reference.top]
            by_token += [values for one in shown for values in (one.kl, one.nll, one.agree)]
            by_token += [one.top for one in shown if one.top is not None]
            if any(len(values) != len(example.gold) for values in by_token):
                raise ValueError(f"{example.id} has values for more or fewer tokens than its gold output")
        return self
