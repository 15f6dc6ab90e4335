"""What every loss is given: hidden states at the positions that predict gold tokens, and nothing of other positions.

A loss asks for quantities per token. Those that need logits are computed in chunks of tokens, so that G x V logits
never stand in memory at once.

Symbols: G gold tokens, R of them in a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kvopt.errors import KvoptError
from kvopt.kernels import Head, KLOptions, linear_kl


@dataclass(frozen=True)
class Gold:
    """Gold tokens of some rows under one context.

    Attributes:
        hidden: [G, D] the student's states after the final norm; gradients flow here.
        ids: [G] int64 gold tokens.
        head: the student's head (frozen with LoRA, trained with full fine-tuning).
        anchor: [G, D] the base's (or teacher's) states for the same tokens, where the loss asks for them.
        anchor_head: the base's head, with ``anchor``.
        chunk_bytes: of float32 logits that live at once; what does not fit is computed in chunks, and a second time in
            the backward pass.
    """

    hidden: Tensor
    ids: Tensor
    head: Head
    anchor: Tensor | None = None
    anchor_head: Head | None = None
    chunk_bytes: int = 256 * 2**20

    def log_probs(self) -> Tensor:
        """log p(gold token), [G] float32."""
        return self.over_logits(_log_probs)

    def divergence(self, divergence: str, beta: float = 0.5) -> Tensor:
        """KL(anchor ‖ student) ("forward"), KL(student ‖ anchor) ("reverse") or the JSD ("jsd") at every gold token,
        [G] float32, exact over the vocabulary (``kvopt.kernels``).
        """
        anchor, anchor_head = self._anchored()
        options = KLOptions(divergence=divergence, beta=beta)
        return linear_kl(self.hidden, anchor, self.head, anchor_head, options).kl

    def over_logits(self, formula: Callable[..., Tensor], *beside: Tensor) -> Tensor:
        """Any formula of the student's logits, [G]: ``formula(logits [R, V] float32, ids [R])`` gives [R]; tensors
        ``beside`` [G, …] are given to it, too. What it allocates itself comes on top of ``chunk_bytes``.
        """

        def piece(hidden: Tensor, ids: Tensor, *others: Tensor) -> Tensor:
            return formula(self.head.logits(hidden), ids, *others)

        return self._in_chunks(piece, [self.hidden, self.ids, *beside], matrices=1)

    def over_both_logits(self, formula: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Any formula of the student's and the anchor's logits, [G]: ``formula(logits [R, V], anchor_logits [R, V],
        ids [R])``, float32 each, gives [R]. No gradient flows into the anchor's.
        """
        anchor, anchor_head = self._anchored()

        def piece(hidden: Tensor, anchor: Tensor, ids: Tensor) -> Tensor:
            with torch.no_grad():
                anchor_logits = anchor_head.logits(anchor)
            return formula(self.head.logits(hidden), anchor_logits, ids)

        return self._in_chunks(piece, [self.hidden, anchor, self.ids], matrices=2)

    def _anchored(self) -> tuple[Tensor, Head]:
        if self.anchor is None or self.anchor_head is None:
            raise KvoptError("this loss needs the base's hidden states, or its teacher's")
        return self.anchor, self.anchor_head

    def _in_chunks(self, piece: Callable[..., Tensor], tensors: list[Tensor], *, matrices: int) -> Tensor:
        """``piece`` of some rows of the tensors at a time, as many as so many matrices of logits may have."""
        rows = max(1, self.chunk_bytes // (4 * self.head.size * matrices))
        if len(self.ids) <= rows:
            return piece(*tensors)
        chunks = zip(*(tensor.split(rows) for tensor in tensors), strict=True)
        return torch.cat([checkpoint(piece, *chunk, use_reentrant=False) for chunk in chunks])


def _log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.gather(-1, ids[:, None])[:, 0] - logits.logsumexp(-1)
