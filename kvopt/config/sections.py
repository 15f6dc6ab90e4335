"""Small sections of the config: template, reference, score and report."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from kvopt.config.section import Section


class MessageConfig(Section):
    """One chat message of the template."""

    role: Literal["system", "user", "assistant", "tool", "developer"] = Field(description="who says the message")
    content: str = Field(description="text with {{slots}}; {{keep:words}} must not change in mutations")


class TemplateConfig(Section):
    """The prompt template: exactly one of messages, text and file."""

    messages: list[MessageConfig] | None = Field(
        None, description="chat messages, rendered with the base's chat template"
    )
    text: str | None = Field(None, description="plain text, used without a chat template")
    file: str | None = Field(
        None,
        description="a UTF-8 file: plain template text, or, as .json or .yaml, chat messages or a mapping with messages"
        " or text",
    )
    literal: bool = Field(
        False, description="placeholders of other template languages ({x}, {% if %}, {{ x | f }}) are meant as text"
    )
    scope: Literal["leading", "all"] = Field(
        "leading", description="what contexts replace: leading: static text before the first slot; all: all static text"
    )
    end_token: bool | str = Field(
        True,
        description="add the end-of-turn (or EOS) token to gold outputs, so that stopping is scored too; a token by its"
        " name where it is another one",
    )
    answer_prefix: str | None = Field(
        None,
        description="text between the prompt and every answer, where the base's own answers do not begin at once: an"
        ' empty thinking block, a channel; kvopt says when one is missing, and "" means that none is wanted',
    )
    chat_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="further arguments for the chat template, e.g. {enable_thinking: false}"
    )

    @model_validator(mode="after")
    def _one_source(self) -> TemplateConfig:
        given = [name for name in ("messages", "text", "file") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of messages, text and file (given: {', '.join(given) or 'none'})")
        return self


class ReferenceConfig(Section):
    """How the reference (the base's distributions under the template) is stored."""

    storage: Literal["hidden", "moments"] = Field(
        "hidden",
        description="hidden: hidden states of gold tokens in the model's dtype; moments: also float32 moments of the"
        " training rows, so that a step takes 2 float32 products with the output head instead of 3 (kernels/README.md"
        " says where that is faster)",
    )
    batch_size: int = Field(16, ge=1, description="rows in a batch")


class RaceConfig(Section):
    """Successive halving among the mutations: all run on a few selection rows, the better half on more, and so on."""

    keep: int | None = Field(
        None,
        ge=1,
        description="how many mutations are left at the end and scored on all selection rows; default: score.best",
    )
    share: float = Field(
        0.25,
        gt=0,
        lt=1,
        description="the most row evaluations (one row under one mutation), as a share of those without a race",
    )


class ScoreConfig(Section):
    """How contexts are scored."""

    batch_size: int = Field(16, ge=1, description="rows in a batch")
    resamples: int = Field(2000, ge=100, description="how many bootstrap draws give a 95 % interval")
    select: str = Field(
        "kl",
        description="what mutations and checkpoints of learned contexts are chosen by, on the selection rows: kl (the"
        " lowest forward KL), gold_nll (the lowest), or a metric of evaluate.metrics by its name (the highest; ties go"
        " to the lower KL)",
    )
    max_kl: float | None = Field(
        None,
        gt=0,
        description="mutations above this forward KL on the selection rows are not taken by best-, diverse- and"
        " spread-mutations:K, and diverse looks at all below it; default: no limit, and diverse looks at the better"
        " half",
    )
    best: int = Field(
        5, ge=0, description="how many of the best mutations are scored on the validation rows and reported"
    )
    race: RaceConfig | None = Field(
        None,
        description="mutations that are far from the template on a few selection rows are not scored on the others"
        " (successive halving); with many mutations the best few are found for a quarter of the work. Null scores every"
        " mutation on every selection row",
    )

    @property
    def finalists(self) -> int:
        """How many mutations a race leaves."""
        keep = self.race.keep if self.race is not None else None
        return max(1, self.best) if keep is None else keep

    @model_validator(mode="after")
    def _race_can_be_run(self) -> ScoreConfig:
        if self.race is None:
            return self
        if self.select not in ("kl", "gold_nll"):
            raise ValueError(f"a race is decided by the KL or gold_nll of rows, not by select {self.select!r}")
        if self.finalists < self.best:
            raise ValueError(f"race.keep ({self.finalists}) is less than best ({self.best}), which are all reported")
        return self


class ReportConfig(Section):
    """Which single validation rows the report shows."""

    examples: int = Field(
        3, ge=0, le=50, description="how many rows, evenly spread from the worst to the best; 0 shows none"
    )
    contexts: int = Field(
        6, ge=0, le=20, description="how many learned contexts, besides the original, the best mutation and none"
    )
    top_k: int = Field(5, ge=1, le=50, description="how many tokens are listed where a context prefers another token")
    max_new_tokens: int = Field(32, ge=1, description="an answer (greedy) is cut after so many tokens")
