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
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from kvopt.kernels.contenders import DEFAULT, Loss, NotHere, build
from kvopt.kernels.memory import peak, reset_peak
from kvopt.kernels.options import Head, KLOptions
from kvopt.kernels.reference import linear_kl64

SHAPES_CPU = [(1024, 576, 49152)]
SHAPES_GPU = [(8192, 4096, 128256), (8192, 640, 262144), (8192, 576, 49152)]
NOISE = {"1e-6": 1.4e-3, "1e-3": 4.5e-2, "1e-1": 0.45}
"""Noise on hidden states of unit variance, with logits of standard deviation 1, that gives about this KL (½ noise²)."""


def run(
    shapes: Sequence[tuple[int, int, int]] | None = None,
    implementations: Sequence[str] | None = None,
    out: Path | str | None = None,
    repeats: int = 5,
    dtype: str = "bfloat16",
    logit_std: float = 1.0,
    show: bool = True,
) -> dict[str, Any]:
    """Benchmarks ``implementations`` (default: all) at ``shapes`` of (N, D, V); writes OUT/bench-kl.json and .png.

    Returns {"environment", "shapes": [{"shape", "product_ms", "results": {name: {...}}, "skipped": {name: reason}}]}.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = shapes or (SHAPES_GPU if device.type == "cuda" else SHAPES_CPU)
    report: dict[str, Any] = {"environment": environment(device), "dtype": dtype, "repeats": repeats, "shapes": []}
    for shape in shapes:
        report["shapes"].append(
            _bench_shape(shape, list(implementations or DEFAULT), device, getattr(torch, dtype), repeats, logit_std)
        )
    if out is not None:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bench-kl.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        draw(report, folder / "bench-kl.png")
    if show:
        print_tables(report)
    return report


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and device that the figures belong to."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def _inputs(shape: tuple[int, int, int], noise: float, device: torch.device, dtype: torch.dtype, logit_std: float,
            ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    n, d, v = shape
    generator = torch.Generator(device=device).manual_seed(0)
    weight = (torch.randn(v, d, generator=generator, device=device) * logit_std / d**0.5).to(dtype)
    reference = torch.randn(n, d, generator=generator, device=device)
    candidate = reference + noise / logit_std * torch.randn(n, d, generator=generator, device=device)
    return candidate.to(dtype), reference.to(dtype), weight


def _bench_shape(
    shape: tuple[int, int, int], names: list[str], device: torch.device, dtype: torch.dtype, repeats: int, std: float
) -> dict[str, Any]:
    losses: dict[str, Loss] = {}
    skipped: dict[str, str] = {}
    results: dict[str, dict[str, Any]] = {}
    candidate, reference, weight = _inputs(shape, NOISE["1e-3"], device, dtype, std)
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
    for name, result in results.items():
        times = sorted(result.pop("times_ms"))
        result.update(median_ms=median(times), min_ms=times[0], max_ms=times[-1], products=median(times) / product)
        result["errors"] = {}
        for kl, noise in NOISE.items():
            result["errors"][kl] = _errors(losses[name], shape, noise, device, dtype, std)
    return {"shape": shape, "product_ms": product, "results": results, "skipped": skipped}


def _step(loss: Loss, candidate: Tensor, reference: Tensor, weight: Tensor) -> tuple[Tensor, int]:
    """One forward and backward: (gradient, peak extra bytes)."""
    before = reset_peak(candidate.device)
    leaf = candidate.detach().requires_grad_()
    loss(leaf, reference, weight).backward()
    assert leaf.grad is not None
    return leaf.grad, peak(candidate.device) - before


def _errors(
    loss: Loss, shape: tuple[int, int, int], noise: float, device: torch.device, dtype: torch.dtype, std: float
) -> dict[str, float]:
    """Relative errors of value and gradient (Frobenius) on 64 tokens against float64."""
    candidate, reference, weight = _inputs((64, *shape[1:]), noise, device, dtype, std)
    exact = candidate.double().requires_grad_()
    head = Head(weight)
    kl64 = linear_kl64(exact, reference, head, head, KLOptions()).mean()
    kl64.backward()
    leaf = candidate.detach().requires_grad_()
    value = loss(leaf, reference, weight)
    value.backward()
    assert exact.grad is not None
    assert leaf.grad is not None
    gradient = (leaf.grad.double() - exact.grad).norm() / exact.grad.norm()
    return {
        "kl": kl64.item(),
        "value": abs(value.item() - kl64.item()) / kl64.item(),
        "gradient": gradient.item(),
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


def print_tables(report: dict[str, Any]) -> None:
    """One rich table per shape, on standard error."""
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True, width=None if sys.stderr.isatty() else 160)
    for entry in report["shapes"]:
        n, d, v = entry["shape"]
        title = (
            f"forward KL and gradient, N={n} D={d} V={v}, {report['dtype']}; one product {entry['product_ms']:.0f} ms"
        )
        table = Table(title=title)
        headings = ["", "median ms", "min-max", "products", "extra MiB", *(f"err @{kl}" for kl in NOISE)]
        for heading in headings:
            table.add_column(heading, justify="left" if not heading else "right")
        for name, r in sorted(entry["results"].items(), key=lambda item: item[1]["median_ms"]):
            errors = [f"{e['value']:.0e} / {e['gradient']:.0e}" for e in r["errors"].values()]
            spread = f"{r['min_ms']:.0f}-{r['max_ms']:.0f}"
            table.add_row(
                name, f"{r['median_ms']:.0f}", spread, f"{r['products']:.1f}", f"{r['extra_mib']:.0f}", *errors
            )
        console.print(table)
        console.print("err: relative error of value / gradient at this KL")
        for name, reason in entry["skipped"].items():
            console.print(f"skipped {name}: {reason}", markup=False)


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
            x, y = r["median_ms"], r["errors"]["1e-3"]["gradient"]
            axes.scatter(x, y, color="tab:blue" if name.startswith("kvopt") else "tab:gray")
            axes.annotate(name, (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
        axes.axhline(1e-2, color="tab:red", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="milliseconds", ylabel="relative gradient error at KL 1e-3")
        axes.set_title("N={} D={} V={}".format(*entry["shape"]))
    figure.savefig(path, dpi=120)
