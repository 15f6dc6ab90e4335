"""One forward pass of rows under their contexts, and the loss of their gold tokens.

Rows of a micro-batch are grouped: those of each soft or KV context stand after its prefix, and so do those of a text
context that several rows share, whose prompt is then run once for all of them, with gradients; what remains is one
padded pass of whole prompts. Losses are summed over gold tokens, so that dividing by the gold tokens of a whole step
makes accumulation and several processes exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from kvopt.base.loading import Base
from kvopt.base.prefix import Prefix, empty_prefix, gold_hidden, prefill
from kvopt.config.losses import Loss
from kvopt.contexts import SoftContext
from kvopt.errors import KvoptError
from kvopt.measure.reference import Reference
from kvopt.task.seam import Row, make_batch
from kvopt.train.gold_tokens import Gold
from kvopt.train.pool import Pool, PoolContext

LEAST_SHARED = 16
"""Tokens of a text's prefix from which on it is run once for all rows of a micro-batch."""

Item = tuple[int, int]
"""(row, context), positions in the pool."""


class ContextLoss(nn.Module):
    """The student with its loss, as one module: what ``transformers.Trainer`` wraps, so that several processes share
    gradients.

    Args:
        student: the student as a Base; its model is the only submodule with parameters.
        base: the frozen base, for losses that are anchored in it.
        pool: contexts and rows.
        loss: nats per gold token.
        reference: the base's states under the original template, for losses that are anchored in those.
    """

    accepts_loss_kwargs = True  # transformers.Trainer: the loss is divided by the gold tokens of the whole step

    def __init__(self, student: Base, base: Base, pool: Pool, loss: Loss, reference: Reference | None = None) -> None:
        super().__init__()
        self.model = student.model
        self.student, self.base = student, base
        self.pool, self.loss, self.reference = pool, loss, reference
        self.counted = [0, 0]  # what a loss counts while it runs; kept in checkpoints
        self._prefixes: dict[tuple[str, int], Prefix] = {}

    def weight_of(self, row: int) -> int:
        """What a row counts in the mean over a step: its gold tokens."""
        return self.pool.gold_counts[row]

    def spent(self, items: Sequence[Item]) -> tuple[int, int]:
        """Tokens that training on these items put through the student, and tokens that the loss was computed on."""
        return sum(self.pool.tokens(*item) for item in items), sum(self.pool.gold_counts[row] for row, _ in items)

    def forward(self, items: Sequence[Item], position: int = 0) -> Tensor:
        """Sum of the loss over the gold tokens of ``items``, float32. ``position`` is their place in the training
        stream, for losses that draw at random.
        """
        sums = [self.loss(self._gold(context, rows)).sum() for context, rows in self._groups(items)]
        return torch.stack(sums).sum()

    def _groups(self, items: Sequence[Item]) -> Iterator[tuple[int | None, list[Row]]]:
        """(context, rows) of each context that rows stand after, and (None, rows) of all whole prompts."""
        met = Counter(context for _, context in items)
        groups: dict[int | None, list[Item]] = {}
        for row, context in items:
            groups.setdefault(context if self._shared(context, met[context]) else None, []).append((row, context))
        for key, members in groups.items():
            if key is None:
                yield key, [self.pool.contexts[context].rows[row] for row, context in members]
            else:
                yield key, [self.pool.contexts[key].encoded.rows[row] for row, _ in members]

    def _shared(self, context: int, rows: int) -> bool:
        """Whether so many rows of a micro-batch stand after the context's prefix: a prompt pays off where it is run
        once instead of several times.
        """
        item = self.pool.contexts[context]
        return not item.is_text or (rows > 1 and len(item.encoded.prefix) >= LEAST_SHARED)

    def _gold(self, context: int | None, rows: Sequence[Row]) -> Gold:
        item = None if context is None else self.pool.contexts[context]
        batch = make_batch(rows, range(len(rows))).to(self.student.device)
        hidden = gold_hidden(self.student, self._student_prefix(item, context), batch)
        if self.loss.anchor == "none":
            return Gold(hidden, batch.gold, self.student.head)
        if self.loss.anchor == "original":
            anchor = self._stored([row.example_id for row in rows])
        else:
            with torch.no_grad():
                anchor = gold_hidden(self.base, self._fixed("base", self.base, item, context), batch)
        return Gold(hidden, batch.gold, self.student.head, anchor, self.base.head)

    def _student_prefix(self, item: PoolContext | None, context: int | None) -> Prefix:
        """Nothing for whole prompts; text and embeddings through the student as it is now; keys and values as they
        are.
        """
        if item is None:
            return empty_prefix(self.student)
        if item.is_text:
            return prefill(self.student, ids=torch.tensor(item.encoded.prefix, device=self.student.device))
        if isinstance(item.context, SoftContext):
            return prefill(self.student, embeddings=item.context.embeddings.to(self.student.device, self.student.dtype))
        return self._fixed("student", self.student, item, context)

    def _fixed(self, who: str, model: Base, item: PoolContext | None, context: int | None) -> Prefix:
        """A prefix that does not change while the student is trained, kept after its first use."""
        if item is None or context is None:
            return empty_prefix(model)
        if (who, context) not in self._prefixes:
            self._prefixes[who, context] = item.context.prefix(model)
        return self._prefixes[who, context]

    def _stored(self, example_ids: Sequence[str]) -> Tensor:
        if self.reference is None:
            raise KvoptError("a loss that is anchored in the original template needs the stored reference")
        return self.reference.hidden(example_ids).to(self.student.device)
