"""One step of on-policy distillation: the student answers, the teacher scores the tokens of the answer.

The loss of a row is the mean divergence over the tokens that it drew (GKD, Agarwal et al. 2024, with λ = 1: every
answer is the student's own), and a step's loss the mean over its rows. No gradient flows through the drawing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from kvopt.base.generate import generate
from kvopt.base.loading import Base
from kvopt.kernels import Head
from kvopt.storage.files import sha256_json
from kvopt.task.seam import Row
from kvopt.train.context_loss import ContextLoss, Group, Item
from kvopt.train.distill.teacher import Teacher
from kvopt.train.gold_tokens import Gold
from kvopt.train.losses.on_policy import OnPolicyDivergence
from kvopt.train.pool import Pool


class OnPolicyLoss(ContextLoss):
    """The student, its teacher and the divergence between them, as one module.

    Args:
        student, base, pool: as in :class:`ContextLoss`.
        loss: divergence, temperature, length of the answers.
        teacher: who scores them.
        seed: what is drawn is a function of it, of the place in the training stream, and of the student.
    """

    def __init__(
        self, student: Base, base: Base, pool: Pool, loss: OnPolicyDivergence, teacher: Teacher, seed: int
    ) -> None:
        super().__init__(_with_common_head(student, teacher.base), base, pool, loss, seed=seed)
        self.settings, self.teacher = loss, teacher

    def weight_of(self, row: int) -> int:
        """A step's loss is a mean over rows."""
        return 1

    def spent(self, items: Sequence[Item]) -> tuple[int, int]:
        """Counted while running, because the length of an answer is known only then."""
        return self.counted[0], self.counted[1]

    def forward(self, items: Sequence[Item], position: int = 0) -> Tensor:
        """Sum over ``items`` of each row's mean divergence per drawn token, float32."""
        sums = []
        for number, group in enumerate(self._groups(items)):
            answered = self._answers(group.context, group.rows, sha256_json([self.seed, position, number]))
            per_token = self.loss(self._gold(replace(group, rows=answered)))
            counts = [len(row.gold) for row in answered]
            sums += [part.mean() for part in per_token.split(counts)]
            self._count(group.context, answered)
        return torch.stack(sums).sum()

    def _answers(self, context: int | None, rows: Sequence[Row], key: str) -> list[Row]:
        """The rows with an answer of the student in place of gold, its end token included."""
        item = None if context is None else self.pool.contexts[context]
        with torch.no_grad(), evaluating(self.model):
            answers = generate(
                self.student,
                self._student_prefix(item, context).detach(),
                [row.body for row in rows],
                max_new_tokens=self.settings.max_new_tokens,
                stop=self.teacher.ends,
                temperature=self.settings.temperature,
                seed=int(key[:10], 16),
                batch_size=len(rows),
                keep_stop=True,
            )
        return [replace(row, gold=answer) for row, answer in zip(rows, answers, strict=True)]

    def _gold(self, group: Group) -> Gold:
        teacher = self.teacher
        head = _cut(teacher.base.head, self.student.head.size)
        return replace(super()._gold(group), anchor=teacher.hidden(group.rows), anchor_head=head)

    def _count(self, context: int | None, answered: Sequence[Row]) -> None:
        """Tokens through the student, in drawing and in learning (as ``Pool.tokens`` counts them: a text that rows
        share once for each), and drawn tokens, over all processes.
        """
        item = None if context is None else self.pool.contexts[context]
        prompt = len(item.encoded.prefix) if item is not None and item.is_text else 0
        drawn = sum(len(row.gold) for row in answered)
        through = 2 * sum(prompt + len(row) - 1 for row in answered)
        counts = torch.tensor([through, drawn], device=self.student.device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        self.counted = [self.counted[0] + int(counts[0]), self.counted[1] + int(counts[1])]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode inside (no dropout, no checkpointing), each as it was afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _with_common_head(student: Base, teacher: Base) -> Base:
    """The student, with its head cut to the rows that both have: models of one family pad their vocabulary to different
    sizes, and no token stands in the padding.
    """
    head = _cut(student.head, teacher.head.size)
    if head is student.head:
        return student
    cut = replace(student)
    cut.head = head
    return cut


def _cut(head: Head, size: int) -> Head:
    return head if head.size <= size else replace(head, vocab=size)
