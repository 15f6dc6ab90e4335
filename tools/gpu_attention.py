"""Part "attention" of ``tools/gpu_check.sh``: rows packed behind a shared prefix against padded ones, at one decoder
layer of an 8B geometry: the same outputs and gradients by the prefix, and the time and memory of each.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

import torch
from gpu_environment import GIB, environment, free_memory, options
from gpu_models import random_base
from gpu_report import Part
from torch import Tensor

from kvopt.base.loading import Base
from kvopt.base.prefix import Prefix, gold_hidden, packing_for
from kvopt.bench.variants import measured
from kvopt.kernels.memory import reset_peak
from kvopt.task.seam import Batch, Row, make_batch

COLUMNS = {
    "what": "what",
    "rows": "name",
    "s": "seconds",
    "peak GiB": "peak_gib",
    "beyond": "extra_gib",
    "note": "note",
}
NOTES = [
    "One decoder layer of Llama-3-8B's shape, forward and backward by the keys and values of the prefix. Packed rows"
    " must give the outputs and gradients of padded ones, to 1e-4 of their norm in float32 and 2 % in bfloat16."
]
GEOMETRY = "Llama-3-8B geometry"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.02}


@dataclass(frozen=True)
class Shape:
    """Prefix slots, rows, and the shortest and longest of them in tokens."""

    prefix: int
    rows: int
    shortest: int
    longest: int


SHAPES = {
    "full": [Shape(1024, 16, 64, 320), Shape(64, 16, 64, 320), Shape(1024, 16, 1000, 1024)],
    "small": [Shape(20, 4, 6, 18)],
}


def ragged(shape: Shape, vocabulary: int) -> Batch:
    """Rows of random ids and lengths, the last third of each gold; always the same."""
    rng = Random(0)
    rows = []
    for number in range(shape.rows):
        ids = [rng.randrange(vocabulary) for _ in range(rng.randint(shape.shortest, shape.longest))]
        cut = len(ids) - max(1, len(ids) // 3)
        rows.append(Row(str(number), tuple(ids[:cut]), tuple(ids[cut:])))
    return make_batch(rows, range(len(rows)))


def layer_step(base: Base, batch: Batch, leaf: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states that predict gold tokens, and the gradient of a fixed weighting of them by the prefix."""
    leaf = leaf.detach().requires_grad_(True)
    hidden = gold_hidden(base, Prefix.unstack(leaf, base.dtype), batch)
    weights = torch.linspace(-1, 1, hidden.numel(), device=hidden.device).view_as(hidden)
    (hidden.float() * weights).sum().backward()
    assert leaf.grad is not None
    return hidden.detach(), leaf.grad


def compared(part: Part, base: Base, shape: Shape, repeats: int) -> None:
    """One line each for padded and packed rows."""
    batch = ragged(shape, base.geometry.vocab_size).to(base.device)
    g = base.geometry
    leaf = torch.randn(shape.prefix, g.layers, 2, g.kv_heads, g.head_dim, device=base.device)
    what = f"{str(base.dtype).removeprefix('torch.')}, {shape.prefix} slots, {shape.rows} rows of {batch.tokens} tokens"
    results: dict[str, tuple[Tensor, Tensor]] = {}
    times: dict[str, tuple[float, int]] = {}
    ways: tuple[Literal["padded", "packed"], ...] = ("padded", "packed")
    for way in ways:
        which = replace(base, attention=way)
        packing = packing_for(which, batch, shape.prefix)

        def work(which: Base = which) -> float:
            return float(layer_step(which, batch, leaf)[0].float().norm())

        results[way] = layer_step(which, batch, leaf)
        free_memory()
        timed = measured(way, work, base.device, repeats, before=reset_peak(base.device))
        times[way] = timed.seconds, timed.extra_bytes
        item = {
            "what": what, "name": way, "seconds": round(timed.seconds, 5),
            "peak_gib": round(timed.peak_bytes / GIB, 3), "extra_gib": round(timed.extra_bytes / GIB, 3),
        }  # fmt: skip
        failed = (packing is None) != (way == "padded")
        if way == "packed":
            pairs = zip(results["packed"], results["padded"], strict=True)
            apart = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs]
            how = "FlexAttention" if packing is not None and packing.in_blocks else "masks of numbers"
            item["note"] = (
                f"{how}; outputs {apart[0]:.1e} and gradients {apart[1]:.1e} apart;"
                f" {times['packed'][0] / times['padded'][0]:.2f} x the time"
            )
            if times["padded"][1]:
                item["note"] += f", {times['packed'][1] / times['padded'][1]:.2f} x the memory beyond the model"
            failed = failed or not max(apart) <= TOLERANCE[base.dtype]
        part.add(item, failed=failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    options(parser)
    given = parser.parse_args()
    device = torch.device(given.device)
    part = Part(given.out, "attention", given.size, given.device, COLUMNS, "Packed and padded rows", NOTES)
    part.facts["environment"] = environment(given.device)
    part.write()
    for dtype in (torch.float32, torch.bfloat16):
        said: list[str] = []
        try:
            base = random_base(GEOMETRY, given.size, device, dtype=dtype, layers=1, say=said.append)
            for line in said:
                part.add({"what": str(dtype), "name": "packed", "note": line}, failed=True)
            for shape in SHAPES[given.size]:
                compared(part, base, shape, 5 if given.size == "full" else 2)
        except Exception as error:  # what one dtype does must not hide the other
            note = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            part.add({"what": str(dtype), "name": "packed", "note": note}, failed=True)
        free_memory()
    return part.finish()


if __name__ == "__main__":
    sys.exit(main())
