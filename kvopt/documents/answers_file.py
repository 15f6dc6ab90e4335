"""``answers.json``: what the base answers under each context of a run, and what the config's metrics say of it."""

from __future__ import annotations

from pydantic import Field, model_validator

from kvopt.documents.leaderboard_file import NamedContext
from kvopt.documents.part import DocumentPart, StandsOn


class ContextAnswer(DocumentPart):
    """The base's greedy answer to one example after one context."""

    text: str = Field(description="the answer, without the tokens that end it")
    cut: bool = Field(False, description="whether it reached the token limit before it ended")
    metrics: dict[str, float | None] = Field(
        {}, description="each metric's headline quantity for this answer; null where it is not defined"
    )


class AnsweredExample(DocumentPart):
    """One validation example with its answers."""

    id: str = Field(description="of the example")
    values: dict[str, str] = Field(description="the values of the template's slots")
    output: str = Field(description="the gold output")
    answers: dict[str, ContextAnswer] = Field(description="by the context's name")


class AnswersDocument(DocumentPart):
    """``answers.json``: what the base answers under each context of a run, and what the config's metrics say of it."""

    split: str = Field("validation", description="where the examples are from")
    max_new_tokens: int = Field(description="where answers are cut, in tokens")
    headlines: list[str] = Field([], description="one quantity for each metric of the config")
    pass_or_fail: list[str] = Field([], description="those headlines whose values are 1 for a pass and 0 for a fail")
    contexts: list[NamedContext] = Field(description="what the answers were given under; the original is the first")
    examples: list[AnsweredExample] = Field(description="in the order of the validation rows")
    stands_on: StandsOn | None = Field(None, description="what it was measured on; absent in old files")

    @model_validator(mode="after")
    def _fits_together(self) -> AnswersDocument:
        for example in self.examples:
            if missing := {context.name for context in self.contexts} - set(example.answers):
                raise ValueError(f"{example.id} has no answer under {', '.join(sorted(missing))}")
        return self
