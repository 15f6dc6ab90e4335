"""How a text is shortened: ``mutations.generator.kind: extract``, and the options of ``kvopt shorten``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from kvopt.config.section import FrozenSection


def _falling(value: tuple[int, ...]) -> tuple[int, ...]:
    if value and min(value) < 1:
        raise ValueError("a length must be at least 1")
    return tuple(sorted(set(value), reverse=True))


Lengths = Annotated[tuple[int, ...], AfterValidator(_falling)]
"""Lengths in tokens, longest first, each once."""


class ShorteningConfig(FrozenSection):
    """What a search for a shorter text may take and must keep."""

    literals: Literal["needed", "all"] = Field(
        "needed",
        description="which of the template's literals (labels, keys, quoted text) must stay: needed, those that stand"
        " in a gold output of the data; all, every one. What is marked {{keep:…}} or listed in mutations.protect stays"
        " in any case",
    )
    rows: int = Field(16, ge=1, description="selection rows that decide; of a template with many labels, take more")
    exchanges: int = Field(
        6, ge=0, description="rounds of exchanges at each length, at most; 0 takes what the cuts alone give"
    )

    @property
    def how(self) -> ShorteningConfig:
        """These settings alone: equal for all that one search can find."""
        return ShorteningConfig(**{name: getattr(self, name) for name in ShorteningConfig.model_fields})


class ShortText(ShorteningConfig):
    """One text that is wanted."""

    tokens: int = Field(ge=1, description="the length that is wanted, at most")


class ExtractGenerator(ShorteningConfig):
    """The template itself, shortened: what matters least to the gold outputs is cut, by the exact KL."""

    kind: Literal["extract"]
    tokens: Lengths = Field(min_length=1, description="the lengths that are wanted, each at most in tokens")
