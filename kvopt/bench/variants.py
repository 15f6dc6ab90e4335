"""One row of a benchmark, how it is measured, and all rows as one document."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvopt.kernels.budget import wait_for
from kvopt.kernels.memory import peak, what_is_counted


@dataclass(frozen=True)
class Variant:
    """One row of a benchmark: median seconds, peak memory, and its KL to compare.

    peak_bytes: the most memory in use while it ran, the model included: resident memory of the process on a CPU, what
    torch's allocator gave out on a GPU. extra_bytes: how much of it came on top of what was in use before.
    floor_seconds: median of the bare products (floor.py), measured in turn with it; None where they were not.
    size: what was measured, in words.
    rows: how rows stood after the prefix, ``packed`` or ``padded``, where the base can do both; else empty.
    memory_of: what peak_bytes counts: ``resident``, or ``allocated on cuda:0``.
    """

    name: str
    seconds: float
    peak_bytes: int
    value: float
    extra_bytes: int = 0
    floor_seconds: float | None = None
    size: str = ""
    rows: str = ""
    memory_of: str = "resident"


def measured(
    name: str,
    work: Callable[[], float],
    device: torch.device,
    repeats: int,
    *,
    before: int,
    warm: Callable[[], object] | None = None,
    floor: Callable[[], None] | None = None,
) -> Variant:
    """Median seconds and peak memory of ``work``, which returns the KL to compare, after ``warm`` (default: itself).

    Args:
        before: bytes in use when the variant began, from ``reset_peak``.
        floor: bare products to be timed in turn with it.
    """
    (warm or work)()
    seconds, floors, value = [], [], 0.0
    for _ in range(repeats):
        if floor is not None:
            floors.append(timed(floor, device))
        wait_for(device)
        start = time.perf_counter()
        value = work()
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    largest = peak(device)
    bare = statistics.median(floors) if floors else None
    extra, counted = max(0, largest - before), what_is_counted(device)
    return Variant(name, statistics.median(seconds), largest, value, extra, bare, memory_of=counted)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    wait_for(device)
    start = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - start


def as_json(title: str, variants: Sequence[Variant]) -> dict[str, Any]:
    """The result as one document; ratios are of the last variant to the first.

    floor_share: the share of the first variant's time that its bare products take.
    """
    first, last = variants[0], variants[-1]
    return {
        "benchmark": title,
        "threads": torch.get_num_threads(),
        "variants": [vars(v) for v in variants],
        "time_ratio": last.seconds / first.seconds,
        "floor_share": None if first.floor_seconds is None else first.floor_seconds / first.seconds,
        "peak_memory_ratio": last.peak_bytes / first.peak_bytes,
    }
