"""``kvopt bench kl --memory``: extra memory of value and gradient by number of tokens, each in a process of its own.

What grows with N are the inputs and the results (a float32 gradient [N, D] until the backward, then one in the inputs'
dtype); everything else must be flat.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kvopt.kernels.linear_kl import linear_kl
from kvopt.kernels.memory import AllocationMeter, peak, reset_peak
from kvopt.kernels.options import Head, KLOptions

TOKENS = (64, 1024, 16384, 131072)
FEATURES = 16
VOCABULARY = 262144
BUDGET = 32 * 2**20
MIB = 2**20


def run_memory(
    tokens: Sequence[int] = TOKENS,
    vocabulary: int = VOCABULARY,
    features: int = FEATURES,
    budget: int = BUDGET,
    out: Path | str | None = None,
    show: bool = True,
) -> dict[str, Any]:
    """Measures the curve and writes OUT/bench-kl-memory.json; prints each line when it is known, ready for a document.

    Returns {"device", "vocabulary", "features", "budget_mib", "curve": [{"tokens", "extra_mib", "results_mib",
    "counted_mib", "logits_mib", "seconds"}]}: extra_mib is the peak of the process beyond inputs and results,
    counted_mib the same counted tensor by tensor on at most 4,096 tokens (None above).
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report: dict[str, Any] = {
        "device": device,
        "torch": torch.__version__,
        "vocabulary": vocabulary,
        "features": features,
        "budget_mib": budget / MIB,
        "curve": [],
    }
    if show:
        _say(f"V = {vocabulary}, D = {features}, bfloat16, a chunk budget of {budget / MIB:.0f} MiB\n")
        _say(
            "| tokens | extra MiB | counted MiB | results MiB | full logits MiB | seconds |\n|---|---|---|---|---|---|"
        )
    for count in tokens:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            entry = pool.apply(_measure, (count, vocabulary, features, budget, device, torch.get_num_threads()))
        report["curve"].append(entry)
        if show:
            counted = "–" if entry["counted_mib"] is None else f"{entry['counted_mib']:.0f}"
            _say(
                f"| {count:,} | {entry['extra_mib']:.0f} | {counted} | {entry['results_mib']:.1f}"
                f" | {entry['logits_mib']:,.0f} | {entry['seconds']:.1f} |"
            )
    if out is not None:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bench-kl-memory.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _measure(count: int, vocabulary: int, features: int, budget: int, device: str, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    place = torch.device(device)
    generator = torch.Generator(place).manual_seed(0)
    head = Head(torch.randn(vocabulary, features, generator=generator, device=place).to(torch.bfloat16))
    reference = torch.randn(count, features, generator=generator, device=place)
    candidate = (reference + 0.01 * torch.randn(count, features, generator=generator, device=place)).to(torch.bfloat16)
    reference = reference.to(torch.bfloat16)
    options = KLOptions(chunk_bytes=budget)

    def step(rows: int) -> None:
        leaf = candidate[:rows].detach().requires_grad_()
        linear_kl(leaf, reference[:rows], head, options=options).loss.backward()

    step(2)
    before, start = reset_peak(place), time.perf_counter()
    step(count)
    seconds, extra = time.perf_counter() - start, peak(place) - before
    results = count * (features * (4 + candidate.dtype.itemsize) + 8)
    counted = None
    if count <= 4096:
        with AllocationMeter() as meter:
            step(count)
        counted = (meter.peak - results) / MIB
    return {
        "tokens": count,
        "extra_mib": max(0, extra - results) / MIB,
        "counted_mib": counted,
        "results_mib": results / MIB,
        "logits_mib": count * vocabulary * 2 / MIB,
        "seconds": seconds,
    }
