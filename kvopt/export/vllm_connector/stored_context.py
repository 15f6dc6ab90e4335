"""Exported contexts as a server reads them: their facts, tensors and placeholders, and the base that they belong to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

INCIDENTAL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache")


@dataclass(frozen=True)
class StoredContext:
    """An exported context: a folder with vllm.json and prefix.safetensors.

    Attributes:
        placeholder_ids: what a prompt begins with to get the context.
        marker: how many of them, at the start, are the same for all contexts of a base; 0: none.
        placeholder_text: text that is tokenized into ``placeholder_ids``; None where no such text is known.
        chat: what a chat has before and after the user's message, ``{"before": …, "after": …}``; None: no chat form.
        no_chat: why there is none.
        base: hashes of the base, ``{"weights": …, "config": …}``, where they are known.
    """

    folder: Path
    name: str
    tokens: int
    layers: int
    kv_heads: int
    head_dim: int
    placeholder_ids: tuple[int, ...]
    marker: int = 0
    placeholder_text: str | None = None
    chat: dict[str, str] | None = None
    no_chat: str | None = None
    base: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | Path) -> StoredContext:
        """Raises ValueError for a folder that is no export of this kind."""
        try:
            facts = json.loads((Path(folder) / "vllm.json").read_text("utf-8"))
            ids = tuple(facts.pop("placeholder_ids"))
            context = cls(folder=Path(folder), placeholder_ids=ids, **facts)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder}: not a context exported with kvopt export --to vllm: {error}") from error
        if len(context.placeholder_ids) != context.tokens:
            raise ValueError(f"{folder}: {len(context.placeholder_ids)} placeholder ids for {context.tokens} slots")
        return context

    def begins(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt begins with the placeholder ids."""
        return tuple(prompt[: self.tokens]) == self.placeholder_ids

    def asked_for(self, prompt: Sequence[int] | None) -> bool:
        """Whether a prompt begins with the placeholder ids and goes on after them (something must be computed)."""
        return prompt is not None and len(prompt) > self.tokens and self.begins(prompt)

    def marked(self, prompt: Sequence[int]) -> bool:
        """Whether the ids that mark a prompt with placeholders stand anywhere in it."""
        marker = self.placeholder_ids[: self.marker]
        if not marker or marker[0] not in prompt:
            return False
        return any(tuple(prompt[i : i + len(marker)]) == marker for i, token in enumerate(prompt) if token == marker[0])

    def layer(self, index: int, heads: slice) -> tuple[Tensor, Tensor]:
        """Keys and values [heads, T, d] of one layer, fp32."""
        with safe_open(str(self.folder / "prefix.safetensors"), framework="pt") as file:
            keys, values = (file.get_slice(f"layers.{index}.{what}") for what in ("keys", "values"))
            return keys[heads], values[heads]


def heads_of_rank(kv_heads: int, ranks: int, rank: int) -> slice:
    """The key/value heads that one tensor-parallel rank holds: a share of them, or one that several ranks share.

    Raises ValueError when neither divides the other (vLLM refuses such a size too).
    """
    if kv_heads % ranks == 0:
        share = kv_heads // ranks
        return slice(rank * share, (rank + 1) * share)
    if ranks % kv_heads == 0:
        head = rank // (ranks // kv_heads)
        return slice(head, head + 1)
    raise ValueError(f"{kv_heads} key/value heads do not divide among {ranks} tensor-parallel ranks")


def check_blocks(name: str, tokens: int, block_size: int, allow_partial: bool = False) -> None:
    """Raise ValueError unless the context fills whole blocks. No slot can be padded: every slot takes attention."""
    rest = tokens % block_size
    if rest and not allow_partial:
        fix = f"shorten it to {tokens - rest} slots (kvopt truncate), " if tokens > rest else ""
        raise ValueError(
            f"{name} has {tokens} slots, which do not fill blocks of {block_size}: {fix}learn it with a multiple, or"
            f" allow a partial block"
        )


def open_contexts(folders: Sequence[str] | Mapping[str, str]) -> list[StoredContext]:
    """The contexts in ``folders``, by their own names or by the keys of a mapping.

    Raises ValueError for a folder that is no export, and where two contexts have one name or the same content: no
    request could tell them apart.
    """
    if isinstance(folders, Mapping):
        contexts = [replace(StoredContext.open(folder), name=name) for name, folder in folders.items()]
    else:
        contexts = [StoredContext.open(folder) for folder in folders]
    for number, context in enumerate(contexts):
        for other in contexts[:number]:
            if other.name == context.name:
                raise ValueError(
                    f"{other.folder} and {context.folder} are both named {context.name}: give them names, as"
                    f' {{"contexts": {{"one": "{other.folder}", "two": "{context.folder}"}}}}'
                )
            if other.placeholder_ids == context.placeholder_ids:
                raise ValueError(f"{other.folder} and {context.folder} have the same content: leave one out")
    return contexts


def check_base(context: StoredContext, folder: Path, hashes: dict[str, str]) -> None:
    """Raise ValueError for a context of another base than the one in ``folder``, whose ``hashes`` are
    :func:`base_hashes`."""
    for what, known in context.base.items():
        if hashes[what] != known:
            raise ValueError(
                f"{context.name} was made for another base than {folder}: it differs in its {what}. Serve the base"
                f" that {context.folder / 'README.md'} names"
            )


def base_hashes(folder: Path, wanted: Sequence[str] = ("weights", "config")) -> dict[str, str]:
    """SHA-256 of a model folder's weight files and of its config.json, as kvopt records them of a base.

    Raises ValueError for a folder without them.
    """
    try:
        made = {"weights": _weights, "config": _config}
        return {what: hashlib.sha256(_canonical(made[what](folder))).hexdigest() for what in wanted}
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: cannot be compared with the base of a context: {error}") from error


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


def _weights(folder: Path) -> list[list[str]]:
    for pattern in ("model*.safetensors", "*.safetensors", "pytorch_model*.bin"):
        files = [f for f in folder.glob(pattern) if not f.name.startswith(("adapter_", "consolidated"))]
        if files:
            return [[file.name, _content(file)] for file in sorted(files, key=lambda file: file.name)]
    raise ValueError("no weight files")


def _content(file: Path) -> str:
    """The hash of a file; one in the hub's cache has it as its name."""
    blob = file.resolve()
    if file.is_symlink() and blob.parent.name == "blobs" and len(blob.name) == 64:
        return blob.name
    return _sha256(file)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _config(folder: Path) -> dict[str, Any]:
    values = json.loads((folder / "config.json").read_text("utf-8"))
    told = {key: value for key, value in values.items() if key not in INCIDENTAL}
    if told.get("auto_map"):
        told["code"] = {file.name: _sha256(file) for file in sorted(folder.glob("*.py"))}
    return told
