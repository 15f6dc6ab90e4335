"""On-policy distillation (GKD, Agarwal et al. 2024, arXiv 2306.13649): a divergence between student and teacher at
every token of an answer that the student itself drew.

reverse: KL(student ‖ teacher). jsd: β KL(teacher ‖ m) + (1 − β) KL(student ‖ m), m = β teacher + (1 − β) student.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from kvopt.errors import KvoptError
from kvopt.kernels import KLOptions, linear_kl
from kvopt.train.losses.gold import Gold


@dataclass(frozen=True)
class OnPolicyDivergence:
    """``gold`` holds drawn tokens, ``gold.anchor`` the teacher's states for them. ``temperature`` and
    ``max_new_tokens`` are of the drawing, ``teacher`` says who the teacher is (``kvopt.train.distill``).
    """

    divergence: str = "reverse"
    beta: float = 0.5
    temperature: float = 1.0
    max_new_tokens: int = 64
    teacher: dict[str, Any] = field(default_factory=dict)
    anchor: Literal["none"] = "none"  # the base is run for nothing

    def __call__(self, gold: Gold) -> Tensor:
        if gold.anchor is None:
            raise KvoptError("on-policy distillation needs the teacher's hidden states")
        options = KLOptions(divergence=self.divergence, beta=self.beta)
        return linear_kl(gold.hidden, gold.anchor, gold.head, gold.anchor_head, options).kl
