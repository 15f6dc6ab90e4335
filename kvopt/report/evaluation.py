"""What the report reads of an evaluated student (``students/NAME/evaluation.json``) and what it shows of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

BASE = "base"
GROUPS = ("original", "held-out", "templates", "wordings", "none", "learned")
ALWAYS = ("gold_nll", "kl_from_base", "top1_agreement")  # quantities of every evaluation


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class Measured(_Part):
    """A mean with its interval; None where it is not defined. Over several contexts also their range."""

    mean: float | None
    ci95: tuple[float, float] | None = None
    min: float | None = None
    max: float | None = None
    spread: float | None = None
    spread_ci95: tuple[float, float] | None = None


class Condition(_Part):
    """One context that a student was evaluated under."""

    name: str
    group: str
    kind: Literal["text", "soft", "kv"] = "text"
    tokens: int = 0
    quantities: dict[str, Measured] = Field(default_factory=dict)


class Group(_Part):
    """Several of these contexts together."""

    group: str
    contexts: list[str] = Field(default_factory=list)
    quantities: dict[str, Measured] = Field(default_factory=dict)
    consistency: Measured | None = None


class Habits(_Part):
    """What a model does without the template, or under an instruction that asks for something else."""

    same_as_original: Measured | None = None
    valid_json: Measured | None = None
    looks_like_task: Measured | None = None


class Forgetting(_Part):
    """How far a student has moved from its base on prompts of other kinds."""

    rows: int = 0
    kl_from_base: Measured | None = None
    gold_nll_change: Measured | None = None
    top1_agreement: Measured | None = None


class Evaluation(_Part):
    """``evaluation.json`` of one student, or of the base."""

    name: str
    headlines: list[str] = Field(default_factory=list)
    quantities: list[str] = Field(default_factory=list)
    contexts: list[Condition] = Field(default_factory=list)
    groups: list[Group] = Field(default_factory=list)
    no_context: Habits | None = None
    frozen_prompt: Habits | None = None
    forgetting: Forgetting | None = None
    rows: dict[str, int] = Field(default_factory=dict)
    student: dict[str, Any] | None = None

    def group(self, name: str) -> Group | None:
        return next((group for group in self.groups if group.group == name), None)

    def headline(self) -> str | None:
        """The quantity that stands for this evaluation on the leaderboard."""
        return next(iter(self.headlines or self.quantities), None)


def in_order(evaluations: Sequence[Evaluation], students: Sequence[str]) -> list[Evaluation]:
    """The base first, then the students in the config's order, then others by name."""
    places = {name: position for position, name in enumerate([BASE, *students])}
    return sorted(evaluations, key=lambda one: (places.get(one.name, len(places)), one.name))


def shown_quantities(evaluations: Sequence[Evaluation]) -> list[str]:
    """Headlines of all evaluations, then what every evaluation has, as far as it was measured."""
    headlines = dict.fromkeys(name for one in evaluations for name in one.headlines)
    measured = [group.quantities for one in evaluations for group in one.groups]
    known = {name for found in measured for name, value in found.items() if value.mean is not None}
    return [
        *(name for name in headlines if name in known),
        *(name for name in ALWAYS if name in known and name not in headlines),
    ]


def group_table(evaluations: Sequence[Evaluation], quantity: str) -> dict[str, Any]:
    """``groups`` (those that exist), and for each student a row: name, a value by group, and the wordings' spread."""
    groups = [name for name in GROUPS if any(one.group(name) for one in evaluations)]
    rows = []
    for one in evaluations:
        found = {name: group.quantities.get(quantity) if (group := one.group(name)) else None for name in groups}
        wordings = one.group("wordings")
        rows.append(
            {
                "name": one.name,
                "values": found,
                "spread": wordings.quantities.get(quantity) if wordings else None,
                "consistency": wordings.consistency if wordings else None,
            }
        )
    return {"quantity": quantity, "groups": groups, "rows": rows}
