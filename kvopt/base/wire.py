"""Orders between the processes of a launch as bytes: tensors by their values, and what every process has by name."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import torch


def packed(value: Any, own: Mapping[str, Any]) -> bytes:
    """A value as bytes. Of a view, only its part of the storage is sent; of a thing that is in ``own``, or of such a
    model's head, its name.
    """
    file = io.BytesIO()
    _Pickler(file, own).dump(value)
    return file.getvalue()


def unpacked(data: bytes, mine: Callable[[str], Any], device: torch.device) -> Any:
    """The value of :func:`packed` in another process.

    Args:
        mine: gives what this process has under a name.
        device: where tensors go that were on an accelerator.
    """
    return _Unpickler(io.BytesIO(data), mine, device).load()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, own: Mapping[str, Any]) -> None:
        super().__init__(file, protocol=5)
        self._names = {id(thing): ("own", name) for name, thing in own.items()}
        heads = ((name, vars(thing).get("head")) for name, thing in own.items() if hasattr(thing, "__dict__"))
        self._names |= {id(head): ("head", name) for name, head in heads if head is not None}

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return self._names.get(id(value))
        flat = value.detach().cpu().contiguous().reshape(-1)
        return "tensor", value.device.type != "cpu", value.dtype, tuple(value.shape), flat.view(torch.uint8).numpy()


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, mine: Callable[[str], Any], device: torch.device) -> None:
        super().__init__(file)
        self._mine, self._device = mine, device

    def persistent_load(self, pid: Any) -> Any:
        kind, *rest = pid
        if kind == "own":
            return self._mine(rest[0])
        if kind == "head":
            return self._mine(rest[0]).head
        moved, dtype, shape, raw = rest
        tensor = torch.empty(shape, dtype=dtype)
        if raw.size:
            tensor.copy_(torch.from_numpy(raw.copy()).view(dtype).reshape(shape))
        return tensor.to(self._device) if moved else tensor
