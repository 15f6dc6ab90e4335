"""The ``study`` section of a config: which students are compared, over which seeds, at which equal budget."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from kvopt.config.evaluation import EvaluateConfig
from kvopt.config.names import NestedOrder
from kvopt.config.section import FrozenSection


class CurveConfig(FrozenSection):
    """How much the n-th mutation helps: students on the original and n mutations; each set contains the one before."""

    counts: tuple[int, ...] = Field((0, 1, 2, 4, 8), min_length=2, description="numbers of mutations")
    context_order: NestedOrder = Field(
        "best",
        description="which mutations come first: best: lowest forward KL; diverse: from the better half, the most"
        " different texts; random: an order drawn with the seed",
    )
    like: str | None = Field(None, description="the arm whose settings these students have; default: the reference")
    quantities: list[str] | None = Field(
        None,
        description="what the curve is fitted to, GROUP/QUANTITY as in study.json; default: the first metric and the"
        " gold NLL, under the original, held-out mutations and templates",
    )

    @field_validator("counts")
    @classmethod
    def _rising(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(n < 0 for n in value) or sorted(set(value)) != list(value):
            raise ValueError("must be rising numbers from 0 on")
        return value


class StudyConfig(FrozenSection):
    """A comparison of students (arms), each trained with every seed at an equal budget."""

    arms: list[str] | None = Field(None, min_length=1, description="names of the students to compare; default: all")
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="each arm is trained once with every seed")
    budget: Literal["steps", "tokens", "epochs"] = Field("steps", description="what all arms get the same amount of")
    amount: float | None = Field(
        None, gt=0, description="that amount; default: what the students say, which must then be equal"
    )
    reference: str | None = Field(None, description="the arm that the others are compared with; default: the first")
    equal_seconds: list[str] = Field(
        default_factory=list,
        description="arms that are trained once more, for as many steps as fit into the seconds of the reference",
    )
    curve: CurveConfig | None = Field(
        None, description="adds arms with different numbers of mutations, and fits how much the n-th one helps"
    )
    evaluate: EvaluateConfig | None = Field(None, description="used in place of the config's evaluate section")

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value) or any(not 0 <= seed < 2**31 for seed in value):
            raise ValueError("must be different numbers from 0 on")
        return value
