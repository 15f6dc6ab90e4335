"""The ``study`` section of a config: which students are compared, over which seeds, at which equal budget."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from kvopt.config.evaluation import EvaluateConfig
from kvopt.config.names import Order
from kvopt.config.section import FrozenSection


class CurveConfig(FrozenSection):
    """What the n-th mutation buys: students on the original and n mutations, each set a part of the next."""

    counts: tuple[int, ...] = Field((0, 1, 2, 4, 8), min_length=2, description="numbers of mutations")
    context_order: Order = Field(
        "best",
        description="mutations by forward KL, lowest first; the better half by distance of their texts; or in an order "
        "drawn with the seed",
    )
    like: str | None = Field(None, description="the arm whose settings they have; default: the reference")
    quantities: list[str] | None = Field(
        None,
        description="what is fitted, GROUP/QUANTITY as in study.json; default: the first metric and the gold NLL under "
        "the original, held-out mutations and templates",
    )

    @field_validator("counts")
    @classmethod
    def _rising(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(n < 0 for n in value) or sorted(set(value)) != list(value):
            raise ValueError("must be rising numbers from 0 on")
        return value


class StudyConfig(FrozenSection):
    """A grid of arms × seeds at equal budgets."""

    arms: list[str] | None = Field(None, min_length=1, description="names of students; default: all")
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="each arm is trained once with each")
    budget: Literal["steps", "tokens", "epochs"] = Field("steps", description="what is equal in all arms")
    amount: float | None = Field(None, gt=0, description="of the budget; default: what the arms say, which must agree")
    reference: str | None = Field(
        None, description="the arm that others are compared with, and whose seconds others get; default: the first"
    )
    equal_seconds: list[str] = Field(
        default_factory=list,
        description="arms that are also trained for as many steps as they can make in the reference's seconds",
    )
    curve: CurveConfig | None = Field(None, description="adds arms with n mutations each and fits what the n-th buys")
    evaluate: EvaluateConfig | None = Field(None, description="instead of the config's evaluate section")

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value) or any(not 0 <= seed < 2**31 for seed in value):
            raise ValueError("must be different numbers from 0 on")
        return value
