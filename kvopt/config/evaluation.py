"""The ``evaluate`` section of a config: what answers are given under, and what is measured of them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from kvopt.config.mutations import EndpointSettings
from kvopt.config.section import LABEL, FrozenSection

MEASURED = ("answer_cut", "gold_nll", "kl_from_base", "top1_agreement")
"""Quantities of every evaluation, whatever its metrics."""
FROZEN_INSTRUCTIONS = (
    "Translate the user's message into French. Reply with the translation alone.",
    "How many words does the user's message have? Reply with the number alone.",
    "Reply to the user with one friendly English sentence. Do not use JSON, lists or labels.",
    "Repeat the user's message in capital letters, word for word, and add nothing.",
)


class _Metric(FrozenSection):
    name: str | None = Field(None, pattern=LABEL, description="how results call it; default: its kind")

    @property
    def label(self) -> str:
        """How results call it."""
        return self.name or str(getattr(self, "kind", ""))


class ExactMatchConfig(_Metric):
    """Share of answers that equal the gold output."""

    kind: Literal["exact-match"]
    normalize: tuple[Literal["strip", "case", "spaces", "punctuation", "json"], ...] = Field(
        ("strip",), description="what is made equal first; json compares parsed values"
    )


class JSONValidConfig(_Metric):
    """Share of answers that are valid JSON and nothing else."""

    kind: Literal["json-valid"]
    container: bool = Field(True, description="only objects and lists count")


class SlotsConfig(_Metric):
    """Precision, recall and F1 over the key/value pairs of a JSON answer, micro over examples."""

    kind: Literal["slots"]
    path: str | None = Field(None, description="dotted keys of the object whose pairs count; default: all")
    ignore_case: bool = Field(False, description="values that differ in case alone are the same")


class RougeLConfig(_Metric):
    """ROUGE-L F1, mean over examples."""

    kind: Literal["rouge-l"]
    stemmer: bool = Field(False, description="compare words by their Porter stems")


class RegexConfig(_Metric):
    """Share of answers that a regular expression matches."""

    kind: Literal["regex"]
    pattern: str = Field(description="a regular expression of Python")
    whole: bool = Field(False, description="the stripped answer must match from end to end")
    absent: bool = Field(False, description="the share of answers in which it is not found")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"is not a regular expression: {error}") from None
        return value


class JSONSchemaConfig(_Metric):
    """Share of answers that a JSON schema accepts."""

    kind: Literal["json-schema"]
    definition: dict[str, Any] | str = Field(description="the schema, or a JSON file with it")


class OwnConfig(_Metric):
    """The mean of a Python function f(answer, gold, values) over answers."""

    kind: Literal["python"]
    target: str = Field(description="python:package.module:function or python:path/to/file.py:function")

    @property
    def label(self) -> str:
        return self.name or re.sub(r"[^A-Za-z0-9_-]", "-", self.target.rpartition(":")[2]) or "python"


class JudgeConfig(EndpointSettings):
    """Scores by a model behind an OpenAI-compatible endpoint, scaled to 0 … 1."""

    kind: Literal["judge"]
    name: str | None = Field(None, pattern=LABEL, description="how results call it; default: its kind")
    instruction: str | None = Field(
        None, description="what the judge is told; {lowest} and {highest} stand for the numbers"
    )
    lowest: int = Field(1, description="the number that is scored 0")
    highest: int = Field(5, description="the number that is scored 1")
    temperature: float = Field(0.0, ge=0, le=2, description="of the judge's sampling")

    @property
    def label(self) -> str:
        """How results call it."""
        return self.name or self.kind

    @model_validator(mode="after")
    def _range(self) -> JudgeConfig:
        if self.lowest >= self.highest:
            raise ValueError("lowest must be under highest")
        return self


def _spelled_out(value: Any) -> Any:
    """A metric's kind alone, or ``python:…``, as the mapping that it is short for."""
    if isinstance(value, str):
        return {"kind": "python", "target": value} if value.startswith("python:") else {"kind": value}
    return value


Check = ExactMatchConfig | JSONValidConfig | RegexConfig | JSONSchemaConfig | OwnConfig
_Check = Annotated[Check, Field(discriminator="kind")]
CheckConfig = Annotated[_Check, BeforeValidator(_spelled_out, json_schema_input_type=str | _Check)]


class ChecksConfig(_Metric):
    """A sum of pass/fail checks; the rate of each is shown."""

    kind: Literal["checks"]
    checks: list[CheckConfig] = Field(min_length=1, description="metrics that an answer passes or fails")

    @field_validator("checks")
    @classmethod
    def _distinct(cls, value: list[Any]) -> list[Any]:
        _distinct_labels(value, "checks")
        if any(check.label == "all" for check in value):
            raise ValueError("'all' is the name of the share that passes every check; name the check otherwise")
        return value


AnyMetric = Check | SlotsConfig | RougeLConfig | JudgeConfig | ChecksConfig
_Metrics = Annotated[AnyMetric, Field(discriminator="kind")]
MetricConfig = Annotated[_Metrics, BeforeValidator(_spelled_out, json_schema_input_type=str | _Metrics)]


def _distinct_labels(metrics: list[Any], what: str) -> None:
    labels = [metric.label for metric in metrics]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"two {what} are called {label!r}: give one of them a name")


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
        [ExactMatchConfig(kind="exact-match")], min_length=1, description="by kind, or with options"
    )
    held_out_mutations: int = Field(4, ge=0, description="accepted mutations that no student is trained on")
    templates: str | None = Field(None, description="a file of templates written by hand, with the same slots")
    contexts: list[str] | None = Field(None, description="learned contexts; default: all of the config")
    probes: ProbesConfig | None = Field(None, description="prompts of other tasks; without them, no forgetting")
    frozen: FrozenConfig | None = Field(FrozenConfig(), description="the frozen-prompt probe; null: none")
    resamples: int = Field(2000, ge=100, description="bootstrap draws of the 95 % intervals")

    @field_validator("metrics")
    @classmethod
    def _distinct(cls, value: list[Any]) -> list[Any]:
        _distinct_labels(value, "metrics")
        for metric in value:
            if metric.label in MEASURED:
                raise ValueError(f"{metric.label!r} is measured anyway; name the metric otherwise")
        return value
