"""The ``evaluate`` section of a config: what answers are given under, and what is measured of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from kvopt.config.metrics import METRICS, Metric, check_distinct, spelled_out
from kvopt.config.section import FrozenSection

MEASURED = ("answer_cut", "gold_nll", "kl_from_base", "top1_agreement")
"""Quantities of every evaluation, whatever its metrics."""
FROZEN_INSTRUCTIONS = (
    "Translate the user's message into French. Reply with the translation alone.",
    "How many words does the user's message have? Reply with the number alone.",
    "Reply to the user with one friendly English sentence. Do not use JSON, lists or labels.",
    "Repeat the user's message in capital letters, word for word, and add nothing.",
)


if TYPE_CHECKING:
    CheckConfig = Metric
    MetricConfig = Metric
else:
    _Check = METRICS.union(lambda metric: metric.pass_or_fail)
    CheckConfig = Annotated[_Check, BeforeValidator(spelled_out, json_schema_input_type=str | _Check)]
    METRICS.complete(CheckConfig=CheckConfig)
    _Metric = METRICS.union()
    MetricConfig = Annotated[_Metric, BeforeValidator(spelled_out, json_schema_input_type=str | _Metric)]


class ProbesConfig(FrozenSection):
    """Prompts that have nothing to do with the task, with answers: what a student forgets shows there."""

    file: str = Field(description="rows with a prompt and an output (.jsonl, .json, .csv)")
    prompt: str = Field("prompt", description="column of the prompt")
    output: str = Field("output", description="column of the answer")
    rows: int | None = Field(64, ge=1, description="rows from the top of the file that are used; null: all")
    max_tokens: int = Field(384, ge=8, description="longer rows are left out (and counted)")


class FrozenConfig(FrozenSection):
    """Instructions that ask for something else on the task's own inputs: does the student still do the task?"""

    instructions: tuple[str, ...] = Field(FROZEN_INSTRUCTIONS, min_length=1, description="each for all the rows")
    rows: int = Field(16, ge=1, description="validation rows for each instruction")
    max_new_tokens: int | None = Field(None, ge=1, description="default: as under the other contexts")


class EvaluateConfig(FrozenSection):
    """How ``kvopt evaluate`` measures the base and the students."""

    rows: int | None = Field(64, ge=1, description="validation rows that are answered; null: all")
    max_new_tokens: int = Field(128, ge=1, description="an answer is cut here")
    temperature: float = Field(0.0, ge=0, le=2, description="0: the most likely token; above: drawn with the seed")
    batch_size: int = Field(16, ge=1, description="bodies a batch")
    metrics: list[MetricConfig] = Field(
        [METRICS.options("exact-match")(kind="exact-match")], min_length=1, description="by kind, or with options"
    )
    held_out_mutations: int = Field(4, ge=0, description="accepted mutations that no student is trained on")
    templates: str | None = Field(None, description="a file of templates written by hand, with the same slots")
    contexts: list[str] | None = Field(None, description="learned contexts; default: all of the config")
    probes: ProbesConfig | None = Field(None, description="prompts of other tasks; without them, no forgetting")
    frozen: FrozenConfig | None = Field(FrozenConfig(), description="the frozen-prompt probe; null: none")
    posix: int | None = Field(
        None,
        ge=1,
        description="answered rows on which POSIX is measured over the wordings (original, held-out, templates): how"
        " far the log probability of an answer moves under another wording. Every answer is scored under every wording;"
        " null: not at all",
    )
    resamples: int = Field(2000, ge=100, description="bootstrap draws of the 95 % intervals")

    @field_validator("metrics")
    @classmethod
    def _distinct(cls, value: list[Any]) -> list[Any]:
        check_distinct(value, "metrics")
        for metric in value:
            if metric.label in MEASURED:
                raise ValueError(f"{metric.label!r} is measured anyway; name the metric otherwise")
        return value
