"""``kvopt bench kl``: time, memory and error of every installed implementation of the forward KL, in one run.

Times are also given relative to one head product measured in the same rounds, because a busy machine changes absolute
times. Errors are against float64 on a subset of tokens, for several magnitudes of the KL. Within a time budget the
number of tokens and rounds follows from the time of a small product, and what would not fit is skipped by name.
"""

from __future__ import annotations

import gc
import json
import math
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from kvopt.kernels import budget as budgets
from kvopt.kernels.budget import Budget
from kvopt.kernels.contenders import DEFAULT, TABLE, Loss, NotHere, build
from kvopt.kernels.float64 import linear_kl64
from kvopt.kernels.memory import peak, reset_peak
from kvopt.kernels.options import Head, KLOptions
from kvopt.kernels.table import USERS, write_table
from kvopt.kernels.user_files import user_file

SHAPES_CPU = [(1024, 576, 49152)]
TABLE_SHAPES_CPU = [(256, 576, 49152), (64, 2048, 128256)]
TABLE_SHAPES_GPU = [(8192, d, v) for d in (576, 1024, 2048, 4096) for v in (49152, 262144)]
SHAPES_GPU = [(8192, 4096, 128256), (8192, 640, 262144), (8192, 576, 49152)]
NOISE = {"1e-6": 1.4e-3, "1e-3": 4.5e-2, "1e-1": 0.45}
"""Noise on hidden states of unit variance, with logits of standard deviation 1, that gives about this KL (½ noise²)."""

ERROR_TOKENS = 64
PROBE_TOKENS = {"cpu": 64, "cuda": 1024}
"""Tokens whose time says what all tokens take; fewer would leave a GPU idle."""
WARM_UPS = {"cpu": 1, "cuda": 3}

Finished = Callable[[tuple[int, int, int], str, dict[str, Any] | str], None]
"""Called with (shape, contender, its result or the reason why it was skipped) as soon as that is known."""


@dataclass(frozen=True)
class KLInputs:
    """What is measured: reference [N, D], candidates [N, D] by a name of their distance, head weight [V, D].

    ``timed`` names the candidate that times and memory are taken of; errors are given for each.
    """

    reference: Tensor
    candidates: dict[str, Tensor]
    weight: Tensor
    timed: str
    name: str = "random weights, logits of standard deviation 1"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, D, V)."""
        return len(self.reference), self.reference.shape[1], len(self.weight)

    def first(self, tokens: int) -> KLInputs:
        """The same with fewer tokens."""
        candidates = {name: candidate[:tokens] for name, candidate in self.candidates.items()}
        return replace(self, reference=self.reference[:tokens], candidates=candidates)

    def some(self, candidate: str) -> tuple[Tensor, Tensor]:
        """Candidate and reference [ERROR_TOKENS, D] at tokens spread over all."""
        stride = max(1, len(self.reference) // ERROR_TOKENS)
        return self.candidates[candidate][::stride][:ERROR_TOKENS], self.reference[::stride][:ERROR_TOKENS]


def random_inputs(shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> KLInputs:
    """Random hidden states and weights of a shape (N, D, V), at the distances of NOISE."""
    n, d, v = shape
    generator = torch.Generator(device=device).manual_seed(0)
    weight = (torch.randn(v, d, generator=generator, device=device) / d**0.5).to(dtype)
    reference = torch.randn(n, d, generator=generator, device=device)
    direction = torch.randn(n, d, generator=generator, device=device)
    candidates = {f"KL {kl}": (reference + noise * direction).to(dtype) for kl, noise in NOISE.items()}
    return KLInputs(reference.to(dtype), candidates, weight, "KL 1e-3")


def run(
    inputs: Sequence[KLInputs | tuple[int, int, int]] | None = None,
    implementations: Sequence[str] | None = None,
    out: Path | str | None = None,
    repeats: int = 5,
    dtype: str | None = None,
    show: bool = True,
    seconds: float | None = None,
    finished: Finished | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Benchmarks ``implementations`` (default: all) on ``inputs``; writes OUT/bench-kl.json, .png and .md.

    Args:
        inputs: shapes (N, D, V) of random problems, or given hidden states; by default shapes for this device.
        dtype: of random problems; by default bfloat16 where the hardware computes in it, else float32.
        show: print a line on standard error as each contender finishes, and the tables in the end.
        device: cuda or cpu, by default cuda where there is one.
        seconds: time budget; fewer tokens and rounds are taken, and slow contenders skipped, to stay within it.

    Returns {"environment", "dtype", "seconds", "shapes": [{"shape", "asked", "inputs", "product_ms", "results": {name:
    {...}}, "skipped": {name: reason}}]}; "asked" is the shape before the budget took tokens away.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    budget, todo = Budget(seconds), list(inputs or (SHAPES_GPU if place.type == "cuda" else SHAPES_CPU))
    dtype = dtype or str(budgets.fast_dtype(place)).removeprefix("torch.")
    report: dict[str, Any] = {
        "environment": environment(place),
        "dtype": dtype,
        "repeats": repeats,
        "seconds": seconds,
        "shapes": [],
    }
    for number, one in enumerate(todo):
        given = one if isinstance(one, KLInputs) else random_inputs(one, place, getattr(torch, dtype))
        part = Budget(None if seconds is None else budget.left / (len(todo) - number))
        report["shapes"].append(_bench(given, list(implementations or DEFAULT), repeats, part, show, finished))
        del given
    if out is not None:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bench-kl.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (folder / "bench-kl.md").write_text(markdown(report), encoding="utf-8")
        draw(report, folder / "bench-kl.png")
    if show:
        print(markdown(report), file=sys.stderr)
    return report


def run_table(out: Path | str | None = None, repeats: int = 5, path: Path | None = None) -> dict[str, Any]:
    """Measures this device's backends and writes its entry of the table in ``path`` (default: the user's own, in the
    cache); returns the benchmark's report.
    """
    path = path or user_file(USERS)
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


def _bench(
    inputs: KLInputs, names: list[str], repeats: int, budget: Budget, show: bool, finished: Finished | None
) -> dict[str, Any]:
    device, asked = inputs.reference.device, inputs.shape
    ready, skipped = _built(names, device)
    probe = inputs.first(PROBE_TOKENS[device.type])
    _timed(lambda: head_product(probe), device)
    token_seconds = _timed(lambda: head_product(probe), device) / len(probe.reference)
    tokens, repeats = budgets.fitting(asked[0], repeats, len(ready), token_seconds, budget.left)
    inputs = inputs.first(tokens)
    exact = {kl: _exact(inputs, kl) for kl in inputs.candidates}
    products: list[float] = []
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        outcome: dict[str, Any] | str = skipped.get(name, "")
        if name in ready:
            try:
                outcome = results[name] = _contend(
                    ready.pop(name), inputs, probe, exact, repeats, budget, len(ready), products
                )
            except Exception as error:  # another library's failure is a finding, not the end of the benchmark
                outcome = skipped[name] = _reason(error)
            gc.collect()  # what a failed contender holds would be counted as the next one's
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if show:
            print(progress_line(inputs.shape, name, outcome), file=sys.stderr, flush=True)
        if finished:
            finished(inputs.shape, name, outcome)
    product = (median(products) if products else token_seconds * tokens) * 1e3
    return {"shape": inputs.shape, "asked": asked, "inputs": inputs.name, "timed": inputs.timed, "product_ms": product,
            "results": results, "skipped": skipped}  # fmt: skip


def _built(names: list[str], device: torch.device) -> tuple[dict[str, Loss], dict[str, str]]:
    """Contenders that can run here, and why the others cannot."""
    ready: dict[str, Loss] = {}
    skipped: dict[str, str] = {}
    for name in names:
        try:
            ready[name] = build(name, device)
        except Exception as error:  # an installed library may fail to be imported, in its own way
            skipped[name] = _reason(error)
    return ready, skipped


def _contend(
    loss: Loss,
    inputs: KLInputs,
    probe: KLInputs,
    exact: dict[str, tuple[float, Tensor]],
    repeats: int,
    budget: Budget,
    waiting: int,
    products: list[float],
) -> dict[str, Any]:
    """One contender's result; the products timed in the same rounds are added to ``products``. Raises NotHere where
    the few tokens of ``probe`` show that one round of all takes longer than its share of what is left, with
    ``waiting`` contenders to come. The first call may compile for long; what it took is gone for all of them.
    """
    device, weight, timed = inputs.reference.device, inputs.weight, inputs.timed
    few = probe.candidates[timed], probe.reference
    first = again = _timed(lambda: _step(loss, *few, weight), device)
    if first < budget.left:
        again = _timed(lambda: _step(loss, *few, weight), device)
    call, fixed = again * len(inputs.reference) / len(few[0]), len(exact) * again
    share = budget.left / (1 + waiting)
    rounds = repeats if math.isinf(share) else int(min(repeats, (share - fixed) / call - 1))
    if rounds < 1:
        raise NotHere(
            f"one round would take about {fixed + 2 * call:.1f} s and {share:.1f} s of the time are left for it"
            f" ({len(few[0])} tokens took {first:.1f} s, then {again:.2f} s); raise --seconds"
        )
    memory: list[tuple[int, int]] = []

    def step() -> None:
        memory.append(_step(loss, inputs.candidates[timed], inputs.reference, weight))

    for _ in range(WARM_UPS[device.type]):
        head_product(inputs)
        step()
    own: list[float] = []
    times: list[float] = []
    for _ in range(rounds):
        own.append(_timed(lambda: head_product(inputs), device))
        times.append(_timed(step, device))
    # What a process once had is not given back, so its first call shows what it takes; a GPU counts each call anew.
    extra, most = memory[-1 if device.type == "cuda" else 0]
    products += own
    typical, product = median(times), median(own)
    return {
        "median_ms": typical * 1e3,
        "min_ms": min(times) * 1e3,
        "max_ms": max(times) * 1e3,
        "rounds": rounds,
        "products": typical / product,
        "of_2f": 2 * product / typical,
        "of_3f": 3 * product / typical,
        "first_call_s": first,
        "extra_mib": extra / 2**20,
        "peak_mib": most / 2**20,
        "errors": {kl: _errors(loss, *inputs.some(kl), weight, *exact[kl]) for kl in exact},
    }


def head_product(inputs: KLInputs) -> Tensor:
    """The floor's unit: one product of all hidden states and the head, in their own dtype."""
    return inputs.reference @ inputs.weight.T


def progress_line(shape: tuple[int, int, int], name: str, outcome: dict[str, Any] | str) -> str:
    """What is said when a contender is done."""
    where = "N={} D={} V={}: ".format(*shape)
    if isinstance(outcome, str):
        return f"{where}skipped {name}: {outcome}"
    return f"{where}{name}: {outcome['median_ms']:.1f} ms, {outcome['products']:.1f} products"


def _reason(error: Exception) -> str:
    """Why a contender has no result, in one line."""
    if isinstance(error, NotHere):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def _step(loss: Loss, candidate: Tensor, reference: Tensor, weight: Tensor) -> tuple[int, int]:
    """One forward and backward: peak bytes beyond what was in use, and all of them."""
    before = reset_peak(candidate.device)
    leaf = candidate.detach().requires_grad_()
    loss(leaf, reference, weight).backward()
    most = peak(candidate.device)
    return most - before, most


def _exact(inputs: KLInputs, kl: str) -> tuple[float, Tensor]:
    """Mean KL of some tokens and its gradient [ERROR_TOKENS, D], in float64."""
    candidate, reference = inputs.some(kl)
    exact, head = candidate.double().requires_grad_(), Head(inputs.weight)
    value = linear_kl64(exact, reference, head, head, KLOptions()).mean()
    value.backward()
    assert exact.grad is not None
    return float(value.detach()), exact.grad


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
    budgets.wait_for(device)
    start = budgets.now()
    function()
    budgets.wait_for(device)
    return budgets.now() - start


def markdown(report: dict[str, Any]) -> str:
    """The report as tables ready for a document, fastest first."""
    lines = []
    where = report["environment"]
    for entry in report["shapes"]:
        n, d, v = entry["shape"]
        results = sorted(entry["results"].items(), key=lambda item: item[1]["median_ms"])
        sizes = {} if not results else {kl: e["kl"] for kl, e in results[0][1]["errors"].items()}
        rounds = max((r["rounds"] for r in entry["results"].values()), default=0)
        fewer = f" (of {entry['asked'][0]}, to end in {report['seconds']:.0f} s)" if entry["asked"][0] > n else ""
        lines += [
            f"## Forward KL and gradient, N = {n}, D = {d}, V = {v}, {report['dtype']}",
            f"{where['device']}, torch {where['torch']}, {where['threads']} threads, {n} tokens{fewer}, {rounds}"
            f" rounds; {entry['inputs']}; timed at {entry['timed']}. One product: {entry['product_ms']:.3g} ms; 2F and"
            " 3F: what two and three of them take, as a share of the median. Relative errors of value / gradient"
            f" against float64, on {min(n, ERROR_TOKENS)} tokens.",
            "",
            "| | median ms (range) | products | 2F | 3F | first call s | extra MiB |"
            + "".join(f" {kl} ({size:.1e}) |" for kl, size in sizes.items()),
            "|---" * (7 + len(sizes)) + "|",
        ]
        for name, r in results:
            shown = f"**{name}**" if name == "kvopt" else name
            errors = "".join(f" {e['value']:.0e} / {e['gradient']:.0e} |" for e in r["errors"].values())
            lines.append(
                f"| {shown} | {r['median_ms']:.3g} ({r['min_ms']:.3g}-{r['max_ms']:.3g}) | {r['products']:.1f}"
                f" | {r['of_2f']:.0%} | {r['of_3f']:.0%} | {r['first_call_s']:.1f} | {r['extra_mib']:.0f} |{errors}"
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
