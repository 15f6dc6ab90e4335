"""On-policy distillation (GKD, Agarwal et al. 2024, arXiv 2306.13649): a divergence between student and teacher at
every token of an answer that the student itself drew.

reverse: KL(student ‖ teacher). jsd: β KL(teacher ‖ m) + (1 − β) KL(student ‖ m), m = β teacher + (1 − β) student.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from kvopt.config.losses import Anchor, Loss
from kvopt.config.section import FrozenSection

if TYPE_CHECKING:
    from torch import Tensor

    from kvopt.train.gold_tokens import Gold


class TeacherConfig(FrozenSection):
    """Who scores the answers of on-policy distillation."""

    context: str = Field(
        "original",
        min_length=1,
        description="what it sees: original, none, text:FILE, a mutation's or "
        "learned context's name, or a context folder",
    )
    base: str | None = Field(None, description="a larger model with the same tokenizer; default: the base itself")


class OnPolicyDivergence(Loss):
    """Distillation on answers that the student draws itself (GKD); gold outputs are not used."""

    kind: Literal["on-policy"]
    divergence: Literal["reverse", "jsd"] = Field(
        "reverse", description="KL(student ‖ teacher), or the generalised JSD"
    )
    beta: float = Field(0.5, gt=0, lt=1, description="of the JSD: β KL(teacher ‖ m) + (1 − β) KL(student ‖ m)")
    temperature: float = Field(1.0, ge=0, description="of the student's drawing; 0 takes the most likely tokens")
    max_new_tokens: int = Field(64, ge=1, description="an answer is cut here")
    teacher: TeacherConfig = Field(TeacherConfig(), description="who scores the tokens of an answer")
    anchor: ClassVar[Anchor] = "none"  # the base is run for nothing
    draws: ClassVar[bool] = True

    def __call__(self, gold: Gold) -> Tensor:
        """The divergence; ``gold`` holds drawn tokens, ``gold.anchor`` the teacher's states for them."""
        return gold.divergence(self.divergence, self.beta)
