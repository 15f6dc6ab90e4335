"""Small sections of the config: template, reference, score and report."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from kvopt.config.section import Section


class MessageConfig(Section):
    """One chat message of the template."""

    role: Literal["system", "user", "assistant", "tool", "developer"] = Field(description="who says it")
    content: str = Field(description="text with {{slots}}; {{keep:words}} must not change in mutations")


class TemplateConfig(Section):
    """The template C: exactly one of messages, text and file."""

    messages: list[MessageConfig] | None = Field(
        None, description="chat messages, rendered with the base's chat template"
    )
    text: str | None = Field(None, description="plain text, tokenized as it is")
    file: str | None = Field(None, description="a UTF-8 file with plain template text")
    scope: Literal["leading", "all"] = Field(
        "leading", description="what contexts replace: static text before the first slot, or all static text"
    )
    end_token: bool = Field(
        True, description="gold outputs end with the end-of-turn (or EOS) token, which is scored too"
    )
    chat_kwargs: dict[str, Any] = Field(default_factory=dict, description="further arguments of the chat template")

    @model_validator(mode="after")
    def _one_source(self) -> TemplateConfig:
        given = [name for name in ("messages", "text", "file") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of messages, text and file (given: {', '.join(given) or 'none'})")
        return self


class ReferenceConfig(Section):
    """How the reference is kept."""

    storage: Literal["hidden", "moments"] = Field(
        "hidden",
        description="hidden states of gold tokens in the model's dtype; moments: float32 moments of the training rows"
        " beside them, which take 2 float32 head products a step instead of 3 (see kernels/README.md for where that"
        " pays)",
    )
    batch_size: int = Field(16, ge=1, description="bodies a batch")


class ScoreConfig(Section):
    """How contexts are scored."""

    batch_size: int = Field(16, ge=1, description="bodies a batch")
    resamples: int = Field(2000, ge=100, description="bootstrap draws of the 95 % intervals")
    best: int = Field(5, ge=0, description="how many of the best mutations are scored on the validation rows")


class ReportConfig(Section):
    """What the report shows of single validation examples."""

    examples: int = Field(3, ge=0, le=50, description="from the worst to the best, evenly spread; 0 shows none")
    contexts: int = Field(6, ge=0, le=20, description="learned contexts beside original, best mutation and none")
    top_k: int = Field(5, ge=1, le=50, description="tokens listed where a context would rather say something else")
    max_new_tokens: int = Field(32, ge=1, description="greedy answers are cut here")
