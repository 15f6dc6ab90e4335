"""What the report reads of ``study.json``.

A path names a quantity: ``GROUP/QUANTITY``, ``GROUP/QUANTITY/spread``, ``forgetting/QUANTITY`` and so on.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class OverSeeds(_Part):
    """One quantity of one arm: mean, interval over seeds and over rows and seeds, and each seed's value."""

    mean: float | None
    ci95: tuple[float, float] | None = None
    ci95_bootstrap: tuple[float, float] | None = None
    seeds: list[float | None] = Field(default_factory=list)


class Against(_Part):
    """An arm against the reference arm."""

    difference: OverSeeds
    separable: bool | None = None


class StudyRun(_Part):
    """One seed of an arm."""

    student: str = ""


class Arm(_Part):
    """One way to train students."""

    name: str
    budget: str
    runs: list[StudyRun] = Field(default_factory=list)
    contexts: list[str] = Field(default_factory=list)
    mutations: int | None = None
    steps: float | None = None
    tokens: float | None = None
    seconds: float | None = None
    values: dict[str, OverSeeds] = Field(default_factory=dict)
    against_reference: dict[str, Against] | None = None


class Fit(_Part):
    """a·(n+1)^(−b) + c."""

    a: float
    b: float
    c: float


class FitIntervals(_Part):
    """95 % intervals of a, b and c."""

    a: tuple[float, float]
    b: tuple[float, float]
    c: tuple[float, float]


class Curve(_Part):
    """A quantity by number of mutations, and the power law through it."""

    values: dict[int, Annotated[list[float], Field(min_length=1)]]
    fit: Fit | None = None
    ci95: FitIntervals | None = None
    r2: float | None = None
    p: float | None = None


class Explained(_Part):
    """How much of one number another explains."""

    points: int
    r2: float
    slope: float
    p: float


class Study(_Part):
    """``study.json``."""

    name: str
    seeds: list[int]
    reference: str
    complete: bool
    headlines: list[str]
    interval: str = ""
    bootstrap: str = ""
    base_values: dict[str, float | None] = Field(default_factory=dict)
    arms: list[Arm]
    curve: dict[str, Curve] | None = None
    sweep: dict[str, Explained | None] = Field(default_factory=dict)
