"""Context-anchored KL: −log p_t + λ KL(p0(· | V, C) ‖ pθ(· | V, C')).

With ``anchor: original`` the base sees the original template C while the student sees C', so the student is drawn to
answer under every wording as the base answers under the one that was written with care.

With ``target: masked`` (arXiv 2605.29498) the KL is between the distributions over all tokens but the gold token y,
each renormalised: KL(p0(v) / (1 − p0(y)) ‖ pθ(v) / (1 − pθ(y))), v ≠ y. Its gradient by the gold token's logit is 0, so
the anchor does not work against the cross-entropy. Both are softmaxes of the other tokens' logits: 1 − p is never
computed, and a gold token of probability 1 to the last bit costs no precision.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from kvopt.config.losses import Loss

if TYPE_CHECKING:
    from torch import Tensor

    from kvopt.train.gold_tokens import Gold


class AnchoredKL(Loss):
    """Cross-entropy plus weight · KL between the base and the student."""

    kind: Literal["anchored-kl"]
    weight: float = Field(0.1, ge=0, description="of the KL term (λ)")
    direction: Literal["forward", "reverse"] = Field("forward", description="KL(base ‖ student) or KL(student ‖ base)")
    anchor: Literal["original", "same"] = Field(
        "original", description="what the base sees: the original template, or the context that the student sees"
    )
    target: Literal["all", "masked"] = Field(
        "all",
        exclude_if=lambda target: target == "all",  # students were stored before there was a choice
        description="what the KL is over: the whole vocabulary, or all tokens but the gold one, renormalised, so that "
        "it does not work against the cross-entropy",
    )

    def __call__(self, gold: Gold) -> Tensor:
        """−log p_t + weight · KL in the given direction."""
        if self.target == "all":
            return -gold.log_probs() + self.weight * gold.divergence(self.direction)

        def both(logits: Tensor, anchor_logits: Tensor, ids: Tensor) -> Tensor:
            nll = logits.logsumexp(-1) - logits.gather(-1, ids[:, None])[:, 0]
            return nll + self.weight * masked_kl(logits, anchor_logits, ids, self.direction)

        return gold.over_both_logits(both)


def masked_kl(logits: Tensor, anchor_logits: Tensor, ids: Tensor, direction: str) -> Tensor:
    """KL over the tokens beside the gold ones, [R] nats, from student and base logits [R, V] and gold tokens [R]."""
    gold = ids[:, None]
    log_q, log_p = (z.scatter(-1, gold, -math.inf).log_softmax(-1) for z in (logits, anchor_logits))
    log_ratio = (log_p - log_q).scatter(-1, gold, 0.0)  # it has no meaning there, and no probability
    return (log_p.exp() * log_ratio).sum(-1) if direction == "forward" else -(log_q.exp() * log_ratio).sum(-1)
