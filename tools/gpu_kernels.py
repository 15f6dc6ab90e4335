"""Part "kernels" of ``tools/gpu_check.sh``: the forward KL and its gradient at the shapes of real models, against other
libraries: time, share of the floors of two and three head products, peak memory, gradient error against float64.

Symbols: N tokens, D hidden size, V vocabulary, F one head product (2 N V D floating-point operations).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpu_environment import environment, options
from gpu_report import Part

SHAPES = {
    "full": [(8192, 4096, 151936), (8192, 4096, 128256), (8192, 640, 262144), (8192, 576, 49152)],
    "small": [(150, 40, 1501), (90, 70, 2201)],
}
NAMES = [
    "kvopt",
    "kvopt moments, stored",
    "kvopt direct",
    "kvopt: triton rows",
    "kvopt: triton store-free",
    "kvopt: torch",
    "torch",
    "TRL chunked divergence",
    "Liger chunked JSD",
    "fla fused KL",
    "kvopt float32 products",
    "torch float32",
    "torch compiled",
]
ROUNDS = {"full": 7, "small": 2}
CONTRACT = 1e-2
"""Largest relative error of our values and gradients; the values of stored moments are off by about 1e-5 nats."""

MARKS = [
    "Each row is a forward KL with its gradient by the candidate's hidden states: two models' logits, so three products"
    " (3F), or two (2F) with stored moments. The columns 2F and 3F are these floors as a share of the time.",
    "",
    "Public marks for an H100 in bf16 at N 8192, D 4096, V 151936, of the forward and backward of a *cross-entropy*,"
    " which has one model's logits where a KL has two: bare head product 42 ms; plain 59 ms, 19.9 GiB; TRL chunked"
    " 167 ms, 13.1 GiB; Liger 192 ms, 6.1 GiB. The floor of a form with two products is near 28 ms.",
]
COLUMNS = {
    "shape (N, D, V)": "shape",
    "implementation": "name",
    "ms": "ms",
    "range": "range",
    "F": "products",
    "2F": "of_2f",
    "3F": "of_3f",
    "peak GiB": "peak_gib",
    "extra GiB": "extra_gib",
    "gradient error at KL 1e-6, 1e-3, 1e-1": "errors",
    "note": "note",
}


def item_of(shape: tuple[int, ...], name: str, outcome: dict[str, Any] | str) -> dict[str, Any]:
    """One row of the table."""
    item: dict[str, Any] = {"shape": ", ".join(map(str, shape)), "name": name}
    if isinstance(outcome, str):
        return item | {"note": outcome}
    errors = [error["gradient"] for error in outcome["errors"].values()]
    return item | {
        "ms": round(outcome["median_ms"], 3),
        "range": f"{outcome['min_ms']:.4g}–{outcome['max_ms']:.4g} in {outcome['rounds']}",
        "products": round(outcome["products"], 2),
        "of_2f": f"{outcome['of_2f']:.0%}",
        "of_3f": f"{outcome['of_3f']:.0%}",
        "peak_gib": round(outcome["peak_mib"] / 1024, 3),
        "extra_gib": round(outcome["extra_mib"] / 1024, 3),
        "errors": ", ".join(f"{error:.0e}" for error in errors),
        "measured": outcome,
    }


def broken(name: str, outcome: dict[str, Any] | str, device: str) -> str | None:
    """What is wrong with one of our own results; others' failures are findings."""
    if not name.startswith("kvopt"):
        return None
    if isinstance(outcome, str):
        expected = "raise --seconds" in outcome or (device == "cpu" and "needs a GPU" in outcome)
        return None if expected else outcome
    for kl, error in outcome["errors"].items():
        if not error["gradient"] <= CONTRACT:
            return f"gradient error {error['gradient']:.1e} at {kl}"
        if not error["value"] <= CONTRACT and "moments" not in name:
            return f"value error {error['value']:.1e} at {kl}"
    return None


def table_choices(report: dict[str, Any], device: str) -> str:
    """What ``kvopt bench kl --write-table`` would choose from these measurements, as JSON."""
    from kvopt.kernels import KernelInputError
    from kvopt.kernels.table import write_table

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "backends.json"
        path.write_text("{}", encoding="utf-8")
        try:
            return json.dumps(write_table(report, device, path))
        except KernelInputError as error:
            return str(error)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    options(parser)
    given = parser.parse_args()
    part = Part(given.out, "kernels", given.size, given.device, COLUMNS, "The divergence op on the device", MARKS)
    part.facts["environment"] = environment(given.device)
    part.write()

    from kvopt.kernels import benchmark

    names = [name for name in NAMES if name != "torch compiled" or given.device == "cuda"]

    def finished(shape: tuple[int, int, int], name: str, outcome: dict[str, Any] | str) -> None:
        item, why = item_of(shape, name, outcome), broken(name, outcome, given.device)
        part.add(item | ({"note": why} if why else {}), failed=why is not None)

    shapes, reports = SHAPES[given.size], []
    budget = benchmark.Budget(0.8 * given.seconds - 20)
    work = [math.sqrt(n * d * v) for n, d, v in shapes]  # compiling takes as long for a small shape as for a large one
    for place, shape in enumerate(shapes):
        seconds = budget.left * work[place] / sum(work[place:])
        report = benchmark.run(
            [shape],
            names,
            None,
            ROUNDS[given.size],
            show=False,
            seconds=seconds,
            finished=finished,
            device=given.device,
        )
        entry = report["shapes"][0]
        n, d, v = entry["shape"]
        rate = 2e-9 * n * d * v / entry["product_ms"]
        fewer = f", fewer tokens than {entry['asked'][0]} for lack of time" if n < entry["asked"][0] else ""
        item = {"shape": f"{n}, {d}, {v}", "name": "one head product (F)", "ms": round(entry["product_ms"], 3)}
        part.add(item | {"products": 1.0, "note": f"{rate:.0f} TFLOP/s, {report['dtype']}{fewer}"})
        reports.append(report)
    together = reports[0] | {"shapes": [entry for report in reports for entry in report["shapes"]]}
    part.add({"shape": "all", "name": "backends.json", "note": table_choices(together, given.device)})
    return part.finish()


if __name__ == "__main__":
    sys.exit(main())
