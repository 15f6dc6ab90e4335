"""How much memory a call takes beyond its inputs: tensors counted one by one, or the peak of a process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


class AllocationMeter(TorchDispatchMode):
    """Counts bytes of the tensors that operations inside ``with`` make: ``live`` now, ``peak`` at most.

    Exact and repeatable on any device, but blind to what a library allocates within one operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    @property
    def live(self) -> int:
        """Bytes of tensors made inside that still exist."""
        self._made = {key: entry for key, entry in self._made.items() if not entry[0].expired()}
        return sum(size for _, size in self._made.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                key = _storage_key(leaf)
                if key not in given:
                    storage = leaf.untyped_storage()
                    self._made[key] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.live)
        return result


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


COUNTED = ("cuda", "xpu")
"""Kinds of devices whose allocator counts; elsewhere it is the process's resident memory that is known."""


def what_is_counted(device: torch.device) -> str:
    """What :func:`peak` gives: ``allocated on cuda:0``, or ``resident``, for a device that shares the system's."""
    return f"allocated on {device}" if device.type in COUNTED else "resident"


def reset_peak(device: torch.device) -> int:
    """Bytes in use now, with the peak counted from here; where the system cannot do that, the peak until now."""
    if device.type in COUNTED:
        module = torch.get_device_module(device)
        module.reset_peak_memory_stats(device)
        return module.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return peak_resident()
    return psutil.Process().memory_info().rss


def peak(device: torch.device) -> int:
    """The largest number of bytes in use since ``reset_peak``, or ever."""
    return torch.get_device_module(device).max_memory_allocated(device) if device.type in COUNTED else peak_resident()


def peak_resident() -> int:
    """The most resident memory that this process had at any time, in bytes.

    Linux is asked for VmHWM, because ``getrusage`` there counts what the parent held when it started this process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if resource is None:
        return psutil.Process().memory_info().peak_wset
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024
