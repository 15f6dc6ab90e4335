"""What every start is given, and the tensor that it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvopt.base.loading import Base
from kvopt.base.prefix import Prefix, prefill
from kvopt.config.contexts import Start
from kvopt.contexts.context import KVContext, SoftContext
from kvopt.errors import InputError, counted
from kvopt.task.seam import Row


@dataclass(frozen=True)
class StartTask:
    """The context to start.

    Attributes:
        name: the context's, for messages.
        kind: kv or soft.
        tokens: slots T wanted.
        ids: token ids of the text to start from: the template's prefix, or the prefix of a mutation or of a file.
        rows: training rows, whose bodies give the queries of attention matching.
        source: a context to start from, for ``context:NAME``.
        seed: of the random starts.
    """

    base: Base
    name: str
    kind: Literal["kv", "soft"]
    tokens: int
    ids: Sequence[int]
    rows: Sequence[Row] = ()
    source: KVContext | SoftContext | None = None
    seed: int = 0

    def generator(self) -> torch.Generator:
        """Random numbers of the start's own seed, on the CPU."""
        return torch.Generator().manual_seed(self.seed)

    def full_ids(self) -> Tensor:
        """``ids`` on the device. Raises InputError when they are fewer than the slots wanted."""
        if len(self.ids) < self.tokens:
            raise InputError(
                f"{counted(self.tokens, 'slot')} wanted, the text to start from has {counted(len(self.ids), 'token')}",
                where=f"contexts.{self.name}.tokens",
                fix="lower tokens, start from a longer text, or use init: random-text",
            )
        return torch.tensor(list(self.ids), dtype=torch.int64, device=self.base.device)

    def from_ids(self, ids: Tensor | Sequence[int]) -> Tensor:
        """Token ids as a context of this kind: their own keys and values [T, L, 2, H, d], or embeddings [T, D]."""
        ids = torch.as_tensor(ids, dtype=torch.int64, device=self.base.device)
        with torch.no_grad():
            return prefill(self.base, ids=ids).stack() if self.kind == "kv" else self.base.embed(ids)

    def text_prefix(self) -> Prefix:
        """Keys and values of the whole text, at its own positions."""
        with torch.no_grad():
            return prefill(self.base, ids=self.full_ids())

    def keeping(self, ids: Tensor, keep: Tensor) -> Tensor:
        """The tokens ``ids[keep]`` of the whole text as a context of this kind. Kept keys are re-rotated by T − P, so
        that bodies at position T see them at their old distances to the end.
        """
        if self.kind == "soft":
            return self.from_ids(ids[keep])
        return self.text_prefix().kept(keep).rotated(self.base.rope, self.tokens - len(ids)).stack()

    def prefilled(self, embeddings: Tensor) -> Tensor:
        """Keys and values [T, L, 2, H, d] that input embeddings [T, D] leave behind."""
        with torch.no_grad():
            return prefill(self.base, embeddings=embeddings.to(self.base.device, self.base.dtype)).stack()


def initial_tensor(start: Start, task: StartTask) -> Tensor:
    """The starting value of a context, fp32: kv [T, L, 2, H, d], soft [T, D]."""
    return start.tensor(task).float().contiguous()
