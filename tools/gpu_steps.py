"""Part "steps" of ``tools/gpu_check.sh``: one optimization step and the scoring of text mutations on models of real
sizes, ours against PEFT's CARTRIDGE with full logits and against full prompts, all in one process.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from gpu_environment import GIB, environment, free_memory, options
from gpu_models import GEOMETRIES, SIZES, made_up_task, random_base, stored_base
from gpu_report import Part

from kvopt.base.loading import Base
from kvopt.bench.steps import (
    OTHER_ROWS,
    ScoreCase,
    StepCase,
    naive_scores,
    our_scores,
    our_step,
    peft_step,
    step_case,
)
from kvopt.bench.variants import Variant, measured
from kvopt.kernels.budget import wait_for
from kvopt.kernels.memory import reset_peak
from kvopt.learning.descent import differentiated_loss
from kvopt.measure.reference import build_reference

COLUMNS = {
    "model": "model",
    "what": "what",
    "variant": "name",
    "s": "seconds",
    "peak GiB": "peak_gib",
    "of it beyond the model GiB": "extra_gib",
    "KL": "kl",
    "note": "note",
}
NOTES = [
    "A step is forward and backward of the KL by a KV context; a score is the KL of text mutations. Memory is the most"
    " that torch's allocator gave out (on a CPU: of the process). Two variants of one thing must measure the same KL,"
    " within 10 % where it is above 0.01 nats.",
]
SAME_KL = 0.1
"""Largest relative difference of the KL of two variants, where it is at least LEAST_KL: a plain KL subtracts logits
that were rounded to bfloat16, so a smaller one is mostly rounding.
"""
LEAST_KL = 1e-2

LEAST_SECONDS = 15.0
"""A model is not begun with less than this left."""


class Steps:
    """Measures variants one after the other; what fails or runs out of memory becomes a line, not the end."""

    def __init__(self, part: Part, device: torch.device) -> None:
        self.part, self.device = part, device

    def model(self, name: str, make: Callable[[], Base], size: str) -> None:
        """All that is measured on one model."""
        begun = time.monotonic()
        try:
            base = make()
            wait_for(self.device)
        except Exception as error:  # one model's failure must not hide the other's figures
            self._failed(name, "model", "made", error, ours=True)
            return
        held = sum(p.numel() * p.element_size() for p in base.model.parameters()) / GIB
        seconds, count = time.monotonic() - begun, sum(p.numel() for p in base.model.parameters())
        facts = {"model": name, "what": "model", "name": "made", "seconds": round(seconds, 2)}
        note = f"{count / 1e9:.2f} B parameters, {str(base.dtype).removeprefix('torch.')}"
        self.part.add(facts | {"peak_gib": round(held, 3), "note": note})
        with tempfile.TemporaryDirectory() as folder:
            self._measure(name, base, size, Path(folder))

    def _measure(self, name: str, base: Base, size: str, folder: Path) -> None:
        sizes, repeats = SIZES[size], 5 if size == "full" else 2
        try:
            task = made_up_task(base, sizes)
            prefix = task.original.prefix(base)
            step = step_case(base, prefix, task.encoded, folder / "step", tokens=sizes.slots, batch_size=sizes.batch)
            reference = build_reference(base, prefix, task.encoded, folder / "score")
            scores = ScoreCase(base, task.mutations, task.encoded, reference)
        except Exception as error:
            self._failed(name, "task", "made", error, ours=True)
            return
        rows, first = sizes.batch, task.encoded.rows[0]
        shape = f"{rows} rows of {len(first)} tokens, {len(first.gold)} of them gold"
        what = f"step, {sizes.slots} slots for {len(task.encoded.prefix)} tokens, {shape}"
        ours = self._variant(name, what, lambda: our_step(step, repeats), None, ours=True)
        if ours is not None and ours.rows in OTHER_ROWS:
            other = replace(step, base=replace(base, attention=OTHER_ROWS[ours.rows]))
            self._variant(name, what, lambda: our_step(other, repeats), ours, ours=True)
        what_scores = (
            f"{len(task.mutations)} mutations of {len(task.encoded.prefix)} tokens x {len(task.encoded.rows)} rows"
        )
        our_score = self._variant(name, what_scores, lambda: our_scores(scores, 1), None, ours=True)
        self._variant(name, what_scores, lambda: naive_scores(scores, 1), our_score, ours=False)
        quarter = max(1, rows // 4)
        self._variant(name, what, lambda: step_in_parts(step, repeats, quarter), ours, ours=True)
        self._variant(name, what, lambda: peft_step(step, repeats), ours, ours=False)

    def _variant(
        self, model: str, what: str, measure: Callable[[], Variant], beside: Variant | None, *, ours: bool
    ) -> Variant | None:
        """One line; ``beside`` is our own figure of the same thing, to compare with."""
        try:
            variant = measure()
        except Exception as error:
            self._failed(model, what, "kvopt" if ours else "the other", error, ours=ours)
            return None
        finally:
            free_memory()
        item = {
            "model": model, "what": what, "name": variant.name, "seconds": round(variant.seconds, 4),
            "peak_gib": round(variant.peak_bytes / GIB, 3), "extra_gib": round(variant.extra_bytes / GIB, 3),
            "kl": variant.value,
        }  # fmt: skip
        wrong = ours and not variant.value > 0
        if beside is not None:
            apart = abs(variant.value - beside.value) / max(abs(beside.value), 1e-12)
            extra = variant.extra_bytes / max(1, beside.extra_bytes)
            item["note"] = (
                f"{variant.seconds / beside.seconds:.2f} x the time, {variant.peak_bytes / beside.peak_bytes:.2f} x the"
                f" peak and {extra:.2f} x the memory beyond the model; KL {apart:.1%} apart"
            )
            wrong = beside.value >= LEAST_KL and not apart <= SAME_KL
        self.part.add(item, failed=wrong)
        return variant

    def _failed(self, model: str, what: str, name: str, error: Exception, *, ours: bool) -> None:
        """Out of memory is a finding where it is another's; any other error is a failure."""
        memory = isinstance(error, torch.OutOfMemoryError)
        note = "out of memory" if memory else f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self.part.add({"model": model, "what": what, "name": name, "note": note}, failed=ours or not memory)


def step_in_parts(case: StepCase, repeats: int, at_once: int) -> Variant:
    """The same step with the activations of few rows at a time (``micro_batch_size``)."""

    def step() -> float:
        leaf = case.tensor.clone().requires_grad_(True)
        return differentiated_loss(case.base, "kv", leaf, case.rows, case.reference, leaf=leaf, at_once=at_once)

    device = case.base.device
    return measured(f"kvopt, {at_once} rows at once", step, device, repeats, before=reset_peak(device))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    options(parser)
    given = parser.parse_args()
    begun, device = time.monotonic(), torch.device(given.device)
    part = Part(given.out, "steps", given.size, given.device, COLUMNS, "Steps and scores on the device", NOTES)
    part.facts["environment"] = environment(given.device)
    part.write()
    makers: dict[str, Callable[[], Base]] = {
        name: lambda name=name: random_base(name, given.size, device)  # type: ignore[misc]
        for name in GEOMETRIES
    }
    if folder := os.environ.get("SMOLLM2"):
        makers["SmolLM2"] = lambda: stored_base(Path(folder), device)
    steps = Steps(part, device)
    for name, make in makers.items():
        if given.seconds - (time.monotonic() - begun) < LEAST_SECONDS:
            part.add({"model": name, "what": "model", "name": "made", "note": "no time was left for it"}, failed=True)
            continue
        steps.model(name, make, given.size)
        free_memory()
    return part.finish()


if __name__ == "__main__":
    sys.exit(main())
