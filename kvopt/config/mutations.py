"""The ``mutations`` part of a config: how many, by which operators, with which paraphraser."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, field_validator, model_validator

from kvopt.config.kinds import Family, Options
from kvopt.config.section import FrozenSection
from kvopt.config.shortening import ExtractGenerator

OPERATORS: Family[Options] = Family("kvopt.mutate.operators", "operator")
FAMILIES = ("structure", "syntax", "lexical", "paraphrase")
"""What operators belong to; ``paraphrase`` is what the generator writes."""


class NoGenerator(FrozenSection):
    """No paraphrases: rules alone rewrite the template."""

    kind: Literal["none"] = "none"


class LocalGenerator(FrozenSection):
    """The base model rewrites single sentences."""

    kind: Literal["local"] = "local"
    samples: int = Field(
        default=4, ge=1, le=64, description="how many paraphrases to ask for, for each sentence or list item"
    )
    temperature: float = Field(default=0.7, gt=0, le=2, description="of the sampling")


class EndpointSettings(FrozenSection):
    """How any OpenAI-compatible chat endpoint is asked."""

    base_url: str = Field(description="the address up to and including /v1, e.g. http://localhost:8000/v1")
    model: str = Field(description="the model's name at the endpoint")
    api_key_env: str | None = Field(
        None, description="environment variable that holds the key; the key itself is never stored"
    )
    temperature: float | None = Field(1.0, ge=0, le=2, description="of the sampling; null sends none")
    max_tokens: int | None = Field(
        None,
        ge=1,
        exclude_if=lambda tokens: tokens is None,  # mutations and verdicts were stored before these could be said
        description="the longest answer, thoughts included; null leaves it to the endpoint",
    )
    send_seed: bool = Field(
        True, exclude_if=lambda sends: sends, description="whether a request has a seed; some endpoints refuse it"
    )
    extra_body: dict[str, Any] | None = Field(
        None,
        exclude_if=lambda extra: extra is None,
        description="further fields of every request, such as {reasoning_effort: low}",
    )
    timeout: float = Field(120.0, gt=0, description="seconds for one request")
    retries: int = Field(
        4,
        ge=0,
        le=20,
        description="how often a request is repeated after a timeout, a lost connection, status 429 or 5xx",
    )
    concurrency: int = Field(4, ge=1, le=32, description="how many requests run at the same time")
    HOW: ClassVar[frozenset[str]] = frozenset({"base_url", "api_key_env", "timeout", "retries", "concurrency"})
    """Settings that say how the model is asked, not what comes out: no key holds them."""

    def identity(self) -> dict[str, Any]:
        """The settings that what comes out depends on."""
        return self.model_dump(mode="json", exclude=set(self.HOW))

    @field_validator("base_url")
    @classmethod
    def _is_http(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")):
            raise ValueError("must begin with http:// or https://")
        return value.rstrip("/")


WordingFamily = Literal[
    "rewording", "structure", "mood", "style", "role", "longer", "shorter", "reordering", "placement"
]
WORDING_FAMILIES: tuple[WordingFamily, ...] = get_args(WordingFamily)


class EndpointGenerator(EndpointSettings):
    """Any OpenAI-compatible endpoint rewrites single messages, or with families the whole template."""

    kind: Literal["endpoint"]
    families: tuple[WordingFamily, ...] = Field(
        (),
        exclude_if=lambda families: not families,  # mutations were stored before there was a choice
        description="kinds of wordings of the whole template, asked for in turn, several in one call that shows those"
        " accepted before; all: every kind; default: messages are rewritten one by one",
    )
    distance: Literal["near", "middle", "far"] | None = Field(
        None,
        exclude_if=lambda distance: distance is None,
        description="how far from the template the wordings of families are to be; default: not said",
    )
    at_once: int = Field(
        8, ge=1, le=64, exclude_if=lambda count: count == 8, description="wordings of families in one call"
    )

    @field_validator("families", mode="before")
    @classmethod
    def _all(cls, value: Any) -> Any:
        return WORDING_FAMILIES if value in ("all", ["all"], ("all",)) else value

    @model_validator(mode="after")
    def _of_families(self) -> EndpointGenerator:
        for name in ("distance", "at_once"):
            if name in self.model_fields_set and not self.families:
                raise ValueError(f"{name} says how wordings of families are asked for; add families: all")
        return self


class MeaningCheck(EndpointSettings):
    """A judge at an OpenAI-compatible endpoint says whether a paraphrase demands the same as the template."""

    kind: Literal["judge"]
    temperature: float | None = Field(0.0, ge=0, le=2, description="of the judge's sampling; null sends none")
    faults: Literal["reject", "flag"] = Field(
        "reject", description="what becomes of a wording that it finds different: refused, or accepted with its verdict"
    )


class FileGenerator(FrozenSection):
    """Hand-written variants: a JSONL file, a text file with ``---`` between variants, or a folder of .txt files."""

    kind: Literal["file"]
    path: Path = Field(description="the file or folder")


GeneratorConfig = Annotated[
    NoGenerator | LocalGenerator | EndpointGenerator | FileGenerator | ExtractGenerator, Field(discriminator="kind")
]


def protected_pattern(entry: str) -> re.Pattern[str]:
    """A literal that must not change, plain or ``re:PATTERN``. Raises ValueError for one that is empty or broken."""
    body = entry[3:] if entry.startswith("re:") else re.escape(entry)
    if not body.strip():
        raise ValueError("an entry is empty")
    try:
        return re.compile(body)
    except re.error as error:
        raise ValueError(f"{entry!r} is not a regular expression: {error}") from None


class MutationsConfig(FrozenSection):
    """Other wordings of the template: how many, and what writes them."""

    count: int = Field(32, ge=0, le=100_000, description="how many accepted mutations are wanted")
    operators: tuple[str, ...] = Field(
        FAMILIES, description="families (structure, syntax, lexical, paraphrase) or names of single operators"
    )
    generator: GeneratorConfig = Field(
        LocalGenerator(),
        description="what writes paraphrases, or with extract, what shortens the template; used if operators"
        " contains paraphrase",
    )
    check: MeaningCheck | None = Field(
        None,
        exclude_if=lambda check: check is None,  # mutations were stored before there was a check
        description="a second eye on paraphrases: a judge says whether they demand the same as the template",
    )
    protect: tuple[str, ...] = Field(
        (),
        description="text that must not change, plain or re:PATTERN; JSON keys, numbers, quotes, code, labels and text"
        " marked {{keep:…}} are protected anyway",
    )
    max_depth: int = Field(
        3,
        ge=1,
        le=16,
        description="at most so many operators in one attempt; every eighth attempt may take twice as many",
    )
    max_attempts: int | None = Field(
        None, ge=1, description="stop after so many attempts, even with fewer mutations; default: 25 times count"
    )
    paraphrase_share: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of attempts that begin with a paraphrase; default: the same as for each other family",
    )

    @field_validator("operators")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        rules = (one for one in OPERATORS.values() if getattr(one, "family", None) in FAMILIES)
        known = [*FAMILIES, *sorted(rule.name for rule in rules)]
        for name in value:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                raise ValueError(
                    f"unknown operator {name!r}"
                    + (f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}")
                )
        if not value:
            raise ValueError("no operators")
        return value

    @field_validator("protect")
    @classmethod
    def _compiles(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            protected_pattern(entry)
        return value

    def identity(self) -> dict[str, Any]:
        """The settings that single attempts depend on: not how many are wanted, nor how an endpoint is asked."""
        settings = self.model_dump(mode="json", exclude={"count", "max_attempts"})
        if isinstance(self.generator, EndpointGenerator):
            settings["generator"] = self.generator.identity()
        if self.check is not None:
            settings["check"] = self.check.identity()
        return settings

    @property
    def attempts(self) -> int:
        """The most attempts."""
        return self.max_attempts if self.max_attempts is not None else 25 * self.count
