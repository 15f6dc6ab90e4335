"""The weights of full students, tensor by tensor from their files and into new ones: none is ever whole in memory."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvopt.base.hub import weight_files
from kvopt.errors import InputError
from kvopt.storage.files import write_json

SHARD_BYTES = 4 * 2**30
"""Of a file that is written; so much is in memory at the same time."""
INDEX = "model.safetensors.index.json"
OF_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*")


@dataclass(frozen=True)
class StoredWeights(Mapping[str, Tensor]):
    """The tensors of a folder's safetensors files by name; each is read when it is asked for, and not kept."""

    folder: Path
    places: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path) -> StoredWeights:
        """Open a model folder. Raises InputError for one without safetensors files, or a damaged one."""
        places: dict[str, Any] = {}
        files = [path for path in weight_files(folder) if path.suffix == ".safetensors"]
        if not files:
            raise InputError("has no safetensors files", where=str(folder), fix="save it as safetensors")
        for path in files:
            try:
                opened = safe_open(str(path), framework="pt").__enter__()
            except (SafetensorError, OSError) as error:
                raise InputError(f"is damaged or truncated: {error}", where=str(path)) from None
            places |= dict.fromkeys(opened.keys(), opened)
        return cls(folder, places)

    def __getitem__(self, name: str) -> Tensor:
        return self.places[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.places))

    def __len__(self) -> int:
        return len(self.places)

    def size(self, name: str) -> int:
        """Bytes of a tensor, without reading it."""
        part = self.places[name].get_slice(name)
        bits = re.search(r"\d+", part.get_dtype())  # of F32, BF16, F8_E4M3; BOOL has none
        return math.prod(part.get_shape()) * (int(bits[0]) if bits else 8) // 8

    def like(self, name: str, among: Mapping[str, Tensor]) -> Tensor:
        """The tensor of the same name, whatever stands before it in one of the two. Raises InputError."""
        for candidate in (name, name.partition(".")[2], *(f"{prefix}.{name}" for prefix in ("model", "transformer"))):
            if candidate in among:
                found = among[candidate]
                if found.shape == self[name].shape:
                    return found
        raise InputError(f"{name} has no counterpart in the base's files", where=str(self.folder))


def write_weights(like: StoredWeights, tensor_of: Callable[[str], Tensor], place: Path) -> None:
    """Write ``tensor_of(name)`` for every tensor of ``like`` into ``place``, with the other files of its folder.

    Raises InputError for values that are not finite.
    """
    for path in sorted(like.folder.iterdir()):
        if path.is_file() and not any(path.match(pattern) for pattern in OF_WEIGHTS):
            shutil.copyfile(path, place / path.name)
    shards = _shards(like)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    for file, shard in zip(names, shards, strict=True):
        tensors = {}
        for name in shard:
            tensor = tensor_of(name).contiguous()
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise InputError(f"{name} has values that are not finite", where=str(like.folder))
            tensors[name] = tensor
        save_file(tensors, place / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        write_json(place / INDEX, {"metadata": {"total_size": sum(map(like.size, like))}, "weight_map": index})


def _shards(weights: StoredWeights) -> list[list[str]]:
    """Names in runs of at most SHARD_BYTES."""
    shards: list[list[str]] = [[]]
    total = 0
    for name in weights:
        size = weights.size(name)
        if shards[-1] and total + size > SHARD_BYTES:
            shards.append([])
            total = 0
        shards[-1].append(name)
        total += size
    return shards
