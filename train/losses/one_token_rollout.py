"""One-token rollout (Ming et al. 2025, arXiv 2509.26313): −1/K Σ_k R(a_k) log p(a_k) over K tokens that the student
draws at each position from softmax(logits / temperature); R is 1 for the gold token and −penalty for any other.

A policy gradient with rollouts of one token: what the student would not say itself is neither taught nor punished. The
draws are a function of the student's own states, so that a run that is taken up again draws the same.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from kvopt.config.losses import Anchor, Loss

if TYPE_CHECKING:
    from torch import Tensor

    from kvopt.train.gold_tokens import Gold


class OneTokenRollout(Loss):
    """Policy gradient on tokens that the student draws at each position: a reward for the gold one, else a penalty."""

    kind: Literal["one-token-rollout"]
    samples: int = Field(256, ge=1, description="tokens drawn at each position (K)")
    temperature: float = Field(1.3, gt=0, description="of the draws")
    penalty: float = Field(0.1, ge=0, description="taken for each drawn token that is not the gold one")
    anchor: ClassVar[Anchor] = "none"

    def __call__(self, gold: Gold) -> Tensor:
        """−1/K Σ_k R(a_k) log p(a_k)."""

        def rollout(logits: Tensor, ids: Tensor, uniforms: Tensor) -> Tensor:
            drawn = tokens_at(logits.detach() / self.temperature, uniforms)
            reward = (drawn == ids[:, None]).float() * (1 + self.penalty) - self.penalty
            log_probs = logits.gather(-1, drawn) - logits.logsumexp(-1, keepdim=True)
            return -(reward * log_probs).mean(-1)

        return gold.over_logits(rollout, uniforms_for(gold.hidden, self.samples))


def tokens_at(logits: Tensor, uniforms: Tensor) -> Tensor:
    """The tokens [R, K] int64 at which the summed probabilities of logits [R, V] first exceed uniforms [R, K]."""
    import torch

    summed = logits.softmax(-1).cumsum(-1)
    return torch.searchsorted(summed, uniforms * summed[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)


def uniforms_for(hidden: Tensor, samples: int) -> Tensor:
    """[G, samples] float32 in [0, 1), seeded by the states [G, D] themselves."""
    import torch

    states = hidden.detach().to("cpu", torch.float32).contiguous()
    seed = int.from_bytes(hashlib.sha256(states.numpy().tobytes()).digest()[:7], "big")
    return torch.rand(len(states), samples, generator=torch.Generator().manual_seed(seed)).to(hidden.device)
