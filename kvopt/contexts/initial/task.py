"""What every initialiser is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvopt.attention import Prefix, prefill
from kvopt.contexts.context import KVContext, SoftContext
from kvopt.encoding import Row
from kvopt.errors import InputError
from kvopt.model import Base


@dataclass(frozen=True)
class InitialTask:
    """The context to start.

    Attributes:
        name: the context's, for messages.
        kind: kv or soft.
        tokens: slots T wanted.
        ids: token ids of the text to start from: the template's prefix, or the prefix of a mutation or of a file.
        rows: training rows, whose bodies give the queries of attention matching.
        source: a context to start from, for ``context:NAME``.
        seed: of the random initialisers.
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
        return torch.Generator().manual_seed(self.seed)

    def full_ids(self) -> Tensor:
        """``ids`` on the device. Raises InputError when they are fewer than the slots wanted."""
        if len(self.ids) < self.tokens:
            raise InputError(
                f"{self.tokens} slots wanted, the text to start from has {len(self.ids)} tokens",
                where=f"contexts.{self.name}.tokens",
                mend="lower tokens, start from a longer text, or use init: random-text",
            )
        return torch.tensor(list(self.ids), dtype=torch.int64, device=self.base.device)

    def from_ids(self, ids: Tensor) -> Tensor:
        """Token ids as a context of this kind: their own keys and values, or their embeddings."""
        with torch.no_grad():
            return prefill(self.base, ids=ids).stack() if self.kind == "kv" else self.base.embed(ids)

    def text_prefix(self) -> Prefix:
        """Keys and values of the whole text, at its own positions."""
        with torch.no_grad():
            return prefill(self.base, ids=self.full_ids())


Initialiser = Callable[[InitialTask], Tensor]
