"""``kvopt bench kl``: time, memory and error of every installed implementation of the forward KL, in one run.

Times are interleaved round by round and also given relative to one head product measured in the same rounds, because a
busy machine changes absolute times. Errors are against float64 on a subset of tokens, for several magnitudes of the KL.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from kvopt.kernels.contenders import DEFAULT, TABLE, Loss, NotHere, build
from kvopt.kernels.float64 import linear_kl64
from kvopt.kernels.memory import peak, reset_peak
from kvopt.kernels.options import Head, KLOptions
from kvopt.kernels.table import PATH, write_table

SHAPES_CPU = [(1024, 576, 49152)]
TABLE_SHAPES_CPU = [(256, 576, 49152), (64, 2048, 128256)]
TABLE_SHAPES_GPU = [(8192, d, v) for d in (576, 1024, 2048, 4096) for v in (49152, 262144)]
SHAPES_GPU = [(8192, 4096, 128256), (8192, 640, 262144), (8192, 576, 49152)]
NOISE = {"1e-6": 1.4e-3, "1e-3": 4.5e-2, "1e-1": 0.45}
"""Noise on hidden states of unit variance, with logits of standard deviation 1, that gives about this KL (½ noise²)."""

ERROR_TOKENS = 64


@dataclass(frozen=True)
class Inputs:
    """What is measured: reference [N, D], candidates [N, D] by a name of their distance, head weight [V, D].

    ``timed`` names the candidate that times and memory are taken of; errors are given for each.
    """

    reference: Tensor
    candidates: dict[str, Tensor]
    weight: Tensor
    timed: str
    name: str = "random weights, logits of standard deviation 1"


def random_inputs(shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> Inputs:
    """Random hidden states and weights of a shape (N, D, V), at the distances of NOISE."""
    n, d, v = shape
    generator = torch.Generator(device=device).manual_seed(0)
    weight = (torch.randn(v, d, generator=generator, device=device) / d**0.5).to(dtype)
    reference = torch.randn(n, d, generator=generator, device=device)
    direction = torch.randn(n, d, generator=generator, device=device)
    candidates = {f"KL {kl}": (reference + noise * direction).to(dtype) for kl, noise in NOISE.items()}
    return Inputs(reference.to(dtype), candidates, weight, "KL 1e-3")


def run(
    inputs: Sequence[Inputs | tuple[int, int, int]] | None = None,
    implementations: Sequence[str] | None = None,
    out: Path | str | None = None,
    repeats: int = 5,
    dtype: str = "bfloat16",
    show: bool = True,
) -> dict[str, Any]:
    """Benchmarks ``implementations`` (default: all) on ``inputs``; writes OUT/bench-kl.json, .png and .md.

    Args:
        inputs: shapes (N, D, V) of random problems, or given hidden states; by default shapes for this device.

    Returns {"environment", "shapes": [{"shape", "inputs", "product_ms", "results": {name: {...}}, "skipped": {name:
    reason}}]}.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = inputs or (SHAPES_GPU if device.type == "cuda" else SHAPES_CPU)
    report: dict[str, Any] = {"environment": environment(device), "dtype": dtype, "repeats": repeats, "shapes": []}
    for one in inputs:
        given = one if isinstance(one, Inputs) else random_inputs(one, device, getattr(torch, dtype))
        report["shapes"].append(_bench(given, list(implementations or DEFAULT), repeats))
    if out is not None:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bench-kl.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (folder / "bench-kl.md").write_text(markdown(report), encoding="utf-8")
        draw(report, folder / "bench-kl.png")
    if show:
        print(markdown(report), file=sys.stderr)
    return report


def run_table(out: Path | str | None = None, repeats: int = 5, path: Path = PATH) -> dict[str, Any]:
    """Measures this device's backends and writes its entry of the table in ``path``; returns the benchmark's report."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    report = run(TABLE_SHAPES_GPU if on_gpu else TABLE_SHAPES_CPU, TABLE, out, repeats)
    kind = torch.cuda.get_device_name(device) if on_gpu else "cpu"
    choices = write_table(report, kind, path)
    print(f"{path}: {kind}: {json.dumps(choices)}", file=sys.stderr)
    return report


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and device that the figures belong to."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _bench(inputs: Inputs, names: list[str], repeats: int) -> dict[str, Any]:
    losses: dict[str, Loss] = {}
    skipped: dict[str, str] = {}
    results: dict[str, dict[str, Any]] = {}
    candidate, reference, weight = inputs.candidates[inputs.timed], inputs.reference, inputs.weight
    device = reference.device
    for name in names:
        try:
            losses[name] = build(name, device)
            start = time.perf_counter()
            _, extra = _step(losses[name], candidate, reference, weight)
            _wait(device)
            results[name] = {"first_call_s": time.perf_counter() - start, "extra_mib": extra / 2**20, "times_ms": []}
        except NotHere as error:
            skipped[name] = str(error)
        except Exception as error:  # another library's failure is a finding, not the end of the benchmark
            skipped[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            losses.pop(name, None)
    products = []
    for _ in range(repeats):
        products.append(_timed(lambda: reference @ weight.T, device))
        for name, loss in losses.items():
            elapsed = _timed(lambda loss=loss: _step(loss, candidate, reference, weight), device)  # type: ignore[misc]
            results[name]["times_ms"].append(elapsed * 1e3)
    product = median(products) * 1e3
    for result in results.values():
        times = sorted(result.pop("times_ms"))
        result.update(median_ms=median(times), min_ms=times[0], max_ms=times[-1], products=median(times) / product)
        result["errors"] = {}
    stride = max(1, len(reference) // ERROR_TOKENS)
    for kl, far in inputs.candidates.items():
        few = far[::stride][:ERROR_TOKENS], reference[::stride][:ERROR_TOKENS]
        exact = few[0].double().requires_grad_()
        head = Head(weight)
        kl64 = linear_kl64(exact, few[1], head, head, KLOptions()).mean()
        kl64.backward()
        assert exact.grad is not None
        for name, loss in losses.items():
            results[name]["errors"][kl] = _errors(loss, *few, weight, float(kl64.detach()), exact.grad)
    shape = (len(reference), reference.shape[1], len(weight))
    return {"shape": shape, "inputs": inputs.name, "timed": inputs.timed, "product_ms": product, "results": results,
            "skipped": skipped}  # fmt: skip


def _step(loss: Loss, candidate: Tensor, reference: Tensor, weight: Tensor) -> tuple[Tensor, int]:
    """One forward and backward: (gradient, peak extra bytes)."""
    before = reset_peak(candidate.device)
    leaf = candidate.detach().requires_grad_()
    loss(leaf, reference, weight).backward()
    assert leaf.grad is not None
    return leaf.grad, peak(candidate.device) - before


def _errors(
    loss: Loss, candidate: Tensor, reference: Tensor, weight: Tensor, kl: float, exact: Tensor
) -> dict[str, float]:
    """Relative errors of mean value and gradient (Frobenius) against those in float64."""
    leaf = candidate.detach().requires_grad_()
    value = loss(leaf, reference, weight)
    value.backward()
    assert leaf.grad is not None
    return {
        "kl": kl,
        "value": abs(float(value.detach()) - kl) / kl,
        "gradient": float((leaf.grad.double() - exact).norm() / exact.norm()),
    }


def _timed(function: Any, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    function()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def markdown(report: dict[str, Any]) -> str:
    """The report as tables ready for a document, fastest first."""
    lines = []
    where = report["environment"]
    for entry in report["shapes"]:
        n, d, v = entry["shape"]
        results = sorted(entry["results"].items(), key=lambda item: item[1]["median_ms"])
        sizes = {} if not results else {kl: e["kl"] for kl, e in results[0][1]["errors"].items()}
        lines += [
            f"## Forward KL and gradient, N = {n}, D = {d}, V = {v}, {report['dtype']}",
            f"{where['device']}, torch {where['torch']}, {where['threads']} threads, {report['repeats']} rounds;"
            f" {entry['inputs']}; timed at {entry['timed']}. One product: {entry['product_ms']:.0f} ms. Relative errors"
            f" of value / gradient against float64, on {min(n, ERROR_TOKENS)} tokens.",
            "",
            "| | median ms (range) | products | first call s | extra MiB |"
            + "".join(f" {kl} ({size:.1e}) |" for kl, size in sizes.items()),
            "|---" * (5 + len(sizes)) + "|",
        ]
        for name, r in results:
            shown = f"**{name}**" if name == "kvopt" else name
            errors = "".join(f" {e['value']:.0e} / {e['gradient']:.0e} |" for e in r["errors"].values())
            lines.append(
                f"| {shown} | {r['median_ms']:.0f} ({r['min_ms']:.0f}-{r['max_ms']:.0f}) | {r['products']:.1f}"
                f" | {r['first_call_s']:.1f} | {r['extra_mib']:.0f} |{errors}"
            )
        lines += ["", *(f"Skipped {name}: {reason}" for name, reason in entry["skipped"].items()), ""]
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """Time against gradient error at KL 1e-3, one panel per shape; nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(6 * len(report["shapes"]), 4.5), layout="constrained")
    for index, entry in enumerate(report["shapes"]):
        axes = figure.add_subplot(1, len(report["shapes"]), index + 1)
        for name, r in entry["results"].items():
            x, y = r["median_ms"], r["errors"][entry["timed"]]["gradient"]
            axes.scatter(x, y, color="tab:blue" if name.startswith("kvopt") else "tab:gray")
            axes.annotate(name, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
        axes.axhline(1e-2, color="tab:red", linewidth=0.8)
        axes.set(
            xscale="log", yscale="log", xlabel="milliseconds", ylabel=f"relative gradient error at {entry['timed']}"
        )
        axes.set_title("N={} D={} V={}".format(*entry["shape"]))
    figure.savefig(path, dpi=120)
