"""The kinds of context. Each says which token ids its bodies have and what prefix they attend to; nothing else differs
between them.

Symbols: T slots, L layers, H key/value heads, d head dimension, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from kvopt.base.loading import Base
from kvopt.base.prefix import Prefix, prefill
from kvopt.documents.leaderboard_file import MutationLineage
from kvopt.documents.part import ContextKind
from kvopt.storage.files import sha256_bytes, sha256_json
from kvopt.task.seam import Encoded
from kvopt.task.template import Template


@dataclass(frozen=True)
class Context:
    """What stands in for the template C."""

    name: str
    kind: ClassVar[ContextKind]

    @property
    def tokens(self) -> int:
        """Length of the prefix in slots (text: tokens)."""
        raise NotImplementedError

    def bodies(self, original: Encoded) -> Encoded:
        """The rows to run after this context, given those of the original template."""
        return original

    def prefix(self, base: Base) -> Prefix:
        """The KV prefix, in the base's dtype, on its device, without gradient history."""
        raise NotImplementedError

    def sha256(self) -> str:
        """Identity of the context's content."""
        raise NotImplementedError


@dataclass(frozen=True)
class TextContext(Context):
    """A template's text; ``encoded`` are all examples under it, its own seam included."""

    template: Template
    encoded: Encoded
    lineage: MutationLineage | None = field(default=None, compare=False)
    kind: ClassVar[ContextKind] = "text"

    @property
    def is_mutation(self) -> bool:
        """Whether a search for mutations made it; texts that were only shortened have a lineage without an id."""
        return self.lineage is not None and bool(self.lineage.id)

    @property
    def tokens(self) -> int:
        return len(self.encoded.prefix)

    def bodies(self, original: Encoded) -> Encoded:
        return self.encoded.select([row.example_id for row in original.rows])

    def prefix(self, base: Base) -> Prefix:
        with torch.no_grad():
            return prefill(base, ids=torch.tensor(self.encoded.prefix, device=base.device, dtype=torch.int64))

    def sha256(self) -> str:
        return sha256_json([self.template.to_json(), self.encoded.prefix])


@dataclass(frozen=True)
class NoContext(Context):
    """No template at all: the original's bodies after nothing but the tokenizer's BOS, where it has one."""

    bos: Sequence[int] = ()
    kind: ClassVar[ContextKind] = "text"

    @property
    def tokens(self) -> int:
        return len(self.bos)

    def prefix(self, base: Base) -> Prefix:
        with torch.no_grad():
            return prefill(base, ids=torch.tensor(list(self.bos), device=base.device, dtype=torch.int64))

    def sha256(self) -> str:
        return sha256_json(["none", list(self.bos)])


@dataclass(frozen=True)
class SoftContext(Context):
    """A soft prompt: ``embeddings`` [T, D] fp32 in the space of ``get_input_embeddings()(ids)``."""

    embeddings: Tensor
    kind: ClassVar[ContextKind] = "soft"

    @property
    def tensor(self) -> Tensor:
        """What is learned: the embeddings."""
        return self.embeddings

    @property
    def tokens(self) -> int:
        return self.embeddings.shape[0]

    def prefix(self, base: Base) -> Prefix:
        with torch.no_grad():
            return prefill(base, embeddings=self.embeddings.to(base.device, base.dtype))

    def sha256(self) -> str:
        return _tensor_sha256(self.embeddings)


@dataclass(frozen=True)
class KVContext(Context):
    """A KV cache: ``states`` [T, L, 2, H, d] fp32, keys after RoPE such that bodies start at position T."""

    states: Tensor
    kind: ClassVar[ContextKind] = "kv"

    @property
    def tensor(self) -> Tensor:
        """What is learned: the states."""
        return self.states

    @property
    def tokens(self) -> int:
        return self.states.shape[0]

    def prefix(self, base: Base) -> Prefix:
        return Prefix.unstack(self.states.to(base.device), base.dtype)

    def sha256(self) -> str:
        return _tensor_sha256(self.states)


def _tensor_sha256(tensor: Tensor) -> str:
    data = tensor.detach().to("cpu", torch.float32).contiguous()
    return sha256_bytes(str(tuple(data.shape)).encode() + data.numpy().tobytes())
