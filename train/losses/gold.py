"""What every loss is given: hidden states at the positions that predict gold tokens, and nothing of other positions.

Symbols: G gold tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kvopt.errors import KvoptError
from kvopt.kernels import Head, KLOptions, linear_kl

CHUNK_BYTES = 256 * 2**20
"""float32 logits that are kept for the backward pass at most; beyond, chunks are computed a second time there."""


@dataclass(frozen=True)
class Gold:
    """Gold tokens of some rows under one context.

    Attributes:
        hidden: [G, D] the student's states after the final norm; gradients flow here.
        ids: [G] int64 gold tokens.
        head: the student's head (frozen with LoRA, trained with full fine-tuning).
        anchor: [G, D] the base's states for the same tokens, where the loss asks for them.
        anchor_head: the base's head, with ``anchor``.
    """

    hidden: Tensor
    ids: Tensor
    head: Head
    anchor: Tensor | None = None
    anchor_head: Head | None = None


class Loss(Protocol):
    """A loss: nats per gold token [G], float32. ``anchor`` says under what the base is run for it: nothing, the
    original template (stored reference), or the context that the student sees.
    """

    @property
    def anchor(self) -> Literal["none", "original", "same"]: ...

    def __call__(self, gold: Gold) -> Tensor: ...


def gold_log_probs(gold: Gold, chunk_bytes: int = CHUNK_BYTES) -> Tensor:
    """log p(gold token), [G] float32; no more than ``chunk_bytes`` of logits live until the backward pass."""
    rows = max(1, chunk_bytes // (4 * gold.head.size))
    if len(gold.ids) <= rows:
        return _log_probs(gold.hidden, gold.ids, gold.head)
    pairs = zip(gold.hidden.split(rows), gold.ids.split(rows), strict=True)
    return torch.cat([checkpoint(_log_probs, hidden, ids, gold.head, use_reentrant=False) for hidden, ids in pairs])


def _log_probs(hidden: Tensor, ids: Tensor, head: Head) -> Tensor:
    logits = head.logits(hidden)
    return logits.gather(-1, ids[:, None])[:, 0] - logits.logsumexp(-1)


def anchor_kl(gold: Gold, direction: str) -> Tensor:
    """KL(base ‖ student) ("forward") or KL(student ‖ base) ("reverse") at every gold token, [G] float32, exact over
    the vocabulary (``kvopt.kernels``).
    """
    if gold.anchor is None:
        raise KvoptError("this loss needs the base's hidden states")
    options = KLOptions(divergence=direction)
    return linear_kl(gold.hidden, gold.anchor, gold.head, gold.anchor_head, options).kl
