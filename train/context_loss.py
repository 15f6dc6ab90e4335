"""One forward pass of rows under their contexts, and the loss of their gold tokens.

Rows of a micro-batch are grouped: those of each soft or KV context stand after its prefix, and so do those of a text
context that several rows share, whose prompt is then run once for all of them, with gradients; what remains is one
padded pass of whole prompts. Losses are summed over gold tokens, so that dividing by the gold tokens of a whole step
makes accumulation and several processes exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
from kvopt.train.row_draws import other_context, seen_slots

LEAST_SHARED = 16
"""Tokens of a text's prefix from which on it is run once for all rows of a micro-batch."""

Item = tuple[int, int]
"""(row, context), positions in the pool."""


@dataclass(frozen=True)
class Group:
    """Rows of a micro-batch that stand after one prefix.

    Attributes:
        context: position in the pool; None: whole prompts, of any context.
        rows: what follows the prefix.
        items: (row, context) of each.
        positions: of each in the training stream.
    """

    context: int | None
    rows: list[Row]
    items: list[Item]
    positions: list[int]


class ContextLoss(nn.Module):
    """The student with its loss, as one module: what ``transformers.Trainer`` wraps, so that several processes share
    gradients.

    Args:
        student: the student as a Base; its model is the only submodule with parameters.
        base: the frozen base, for losses that are anchored in it.
        pool: contexts and rows.
        loss: nats per gold token.
        reference: the base's states under the original template, for losses that are anchored in those.
        seed: of what is drawn for a row: the slots that are dropped, its other wording.
        dropout: probability with which a row does not see a slot of its soft or KV context.
    """

    accepts_loss_kwargs = True  # transformers.Trainer: the loss is divided by the gold tokens of the whole step

    def __init__(
        self,
        student: Base,
        base: Base,
        pool: Pool,
        loss: Loss,
        reference: Reference | None = None,
        *,
        seed: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = student.model
        self.student, self.base = student, base
        self.pool, self.loss, self.reference = pool, loss, reference
        self.seed, self.dropout = seed, dropout
        self.counted = [0, 0]  # what a loss counts while it runs; kept in checkpoints
        self._prefixes: dict[tuple[str, int], Prefix] = {}

    def weight_of(self, row: int) -> int:
        """What a row counts in the mean over a step: its gold tokens."""
        return self.pool.gold_counts[row]

    def spent(self, items: Sequence[Item]) -> tuple[int, int]:
        """Tokens that training on these items, the first of the training stream, put through the student, and tokens
        that the loss was computed on.
        """
        through = sum(self.pool.tokens(*item) for item in items)
        if self.loss.anchor == "other":
            others = (other_context(self.pool.weights, c, place, self.seed) for place, (_, c) in enumerate(items))
            through += sum(self.pool.tokens(row, other) for (row, _), other in zip(items, others, strict=True))
        return through, sum(self.pool.gold_counts[row] for row, _ in items)

    def forward(self, items: Sequence[Item], position: int = 0) -> Tensor:
        """Sum of the loss over the gold tokens of ``items``, float32. ``position`` is their place in the training
        stream, for losses that draw at random.
        """
        sums = [self.loss(self._gold(group)).sum() for group in self._groups(items, position)]
        return torch.stack(sums).sum()

    def _groups(self, items: Sequence[Item], position: int = 0) -> Iterator[Group]:
        """The rows of each context that rows stand after, and all whole prompts."""
        met = Counter(context for _, context in items)
        groups: dict[int | None, list[int]] = {}
        for place, (_, context) in enumerate(items):
            groups.setdefault(context if self._shared(context, met[context]) else None, []).append(place)
        for key, places in groups.items():
            members = [items[place] for place in places]
            if key is None:
                rows = [self.pool.contexts[context].rows[row] for row, context in members]
            else:
                rows = [self.pool.contexts[key].encoded.rows[row] for row, _ in members]
            yield Group(key, rows, members, [position + place for place in places])

    def _shared(self, context: int, rows: int) -> bool:
        """Whether so many rows of a micro-batch stand after the context's prefix: a prompt pays off where it is run
        once instead of several times.
        """
        item = self.pool.contexts[context]
        return not item.is_text or (rows > 1 and len(item.encoded.prefix) >= LEAST_SHARED)

    def _gold(self, group: Group) -> Gold:
        context, item = group.context, self._item(group)
        batch = make_batch(group.rows, range(len(group.rows))).to(self.student.device)
        hidden = gold_hidden(self.student, self._student_prefix(item, context), batch, seen=self._seen(group))
        if self.loss.anchor == "none":
            return Gold(hidden, batch.gold, self.student.head)
        if self.loss.anchor == "other":
            return Gold(hidden, batch.gold, self.student.head, self._other(group), self.student.head)
        if self.loss.anchor == "original":
            anchor = self._stored([row.example_id for row in group.rows])
        else:
            with torch.no_grad():
                anchor = gold_hidden(self.base, self._fixed("base", self.base, item, context), batch)
        return Gold(hidden, batch.gold, self.student.head, anchor, self.base.head)

    def _item(self, group: Group) -> PoolContext | None:
        return None if group.context is None else self.pool.contexts[group.context]

    def _seen(self, group: Group) -> Tensor | None:
        """The slots that each row of a soft or KV context attends to, [B, T] bool; None for all of them."""
        item = self._item(group)
        if not self.dropout or item is None or not item.slots:
            return None
        seen = seen_slots(group.positions, item.slots, self.dropout, self.seed)
        return seen.to(self.student.device)

    @torch.no_grad()
    def _other(self, group: Group) -> Tensor:
        """The student's states [G, D] for the same gold tokens, each row under another context of the pool."""
        others = [
            (row, other_context(self.pool.weights, context, position, self.seed))
            for (row, context), position in zip(group.items, group.positions, strict=True)
        ]
        by_row: dict[int, Tensor] = {}
        for part in self._groups(others):
            batch = make_batch(part.rows, range(len(part.rows))).to(self.student.device)
            hidden = gold_hidden(self.student, self._student_prefix(self._item(part), part.context), batch)
            by_row |= zip(part.positions, hidden.split([len(row.gold) for row in part.rows]), strict=True)
        return torch.cat([by_row[place] for place in range(len(others))])

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
