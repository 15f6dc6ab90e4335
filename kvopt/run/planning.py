"""``kvopt plan``: a forecast on named hardware, as one document, with what to change where it does not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import psutil
import torch

from kvopt.base.hardware import EFFICIENCY, HERE, Hardware, named_hardware
from kvopt.base.launch import LAUNCH
from kvopt.base.loading import Base, automatic_dtype, choose_device, load_empty
from kvopt.base.probe import Capability, Geometry, context_window, layer_types, text_config
from kvopt.base.workload import Workload
from kvopt.config.model import ModelConfig
from kvopt.errors import InputError, counted
from kvopt.run.calibration import Rates, measured_rates, typical_shape
from kvopt.run.encoded_task import EncodedTask, encode_task
from kvopt.run.forecast import Forecast
from kvopt.run.inputs import Inputs

GIB = 2**30
USABLE = 0.92
"""Share of a device's memory that a run may fill: the rest is the driver's, and lost between tensors."""
HEAP = 1.5
"""Bytes that a CPU's allocator takes for each byte of activations, whose sizes change from batch to batch (measured on
SmolLM2-135M with glibc); a process gives little of it back, so a later stage peaks at least as high.
"""
LOADED_BYTES = 60 * 2**20
"""What loading leaves in a process on a CPU beside the weights."""
MOST_DEVICES = 64
"""That a plan shares a base out to."""
CALIBRATION = 5.0
"""Seconds of measurement for ``--device here``."""


@dataclass(frozen=True)
class Target:
    """What is planned for: ``count`` devices of one kind, with its usable bytes and what a process takes there beside
    weights and tensors.
    """

    name: str
    kind: Literal["cpu", "cuda"]
    count: int
    memory: float
    process_bytes: int
    dtype: torch.dtype
    rates: Callable[[Workload, Forecast], Rates]
    source: str

    def taken(self, tensor_bytes: int) -> int:
        """Bytes of memory for so many bytes of tensors that come and go."""
        return int(HEAP * tensor_bytes) if self.kind == "cpu" else tensor_bytes


def make_plan(inputs: Inputs, device: str = HERE, count: int = 1) -> dict[str, Any]:
    """The plan of ``kvopt run`` on this hardware. Raises InputError for an unknown device or no device at all."""
    if count < 1:
        raise InputError(f"{count} devices can do nothing", where="--count", fix="give 1 or more")
    settings = inputs.config.model
    target = _here(settings, count) if device == HERE else _named(named_hardware(device), settings, count)
    model, tokenizer = load_empty(settings, target.dtype)
    workload = Workload(model, copies=target.kind == "cpu")
    task = encode_task(inputs, _without_weights(workload, tokenizer, settings))
    return document(Forecast(task, workload, target.kind), target)


def plan_of_run(task: EncodedTask) -> dict[str, Any]:
    """The plan of a run whose base is loaded and whose rows are encoded, on its device, measured for a second."""
    base = task.base
    model, _ = load_empty(task.config.model, base.dtype)
    workload = Workload(model, copies=base.device.type == "cpu")
    target = _on(base.device, base.dtype, 1, 1.0)
    if base.shards is not None and target.kind == "cuda":  # processes on a CPU share one memory
        target = replace(target, count=LAUNCH.count)
    return document(Forecast(task, workload, target.kind), target)


def document(forecast: Forecast, target: Target) -> dict[str, Any]:
    """A forecast on a target, as ``kvopt plan --json`` prints it."""
    rates = target.rates(forecast.workload, forecast)
    weights = forecast.workload.weight_bytes
    sharded = forecast.config.model.shard is not None and target.count > 1
    held = target.process_bytes + (forecast.workload.sharded_bytes(target.count) if sharded else weights)
    if target.kind == "cpu":  # a CPU's products put the head's rows into another order
        held += LOADED_BYTES + forecast.workload.head_bytes
    stages: list[dict[str, Any]] = []
    peak = held
    for stage in forecast.stages:
        seconds, own = rates.seconds(stage.work) / target.count, held + target.taken(stage.work.extra_bytes)
        peak = max(peak, own) if target.kind == "cpu" else own  # a process on a CPU keeps its heap
        stages.append(
            {
                "stage": stage.name,
                "tokens_in": stage.tokens_in,
                "flops": stage.work.flops,
                "peak_memory_bytes": peak,
                "seconds": seconds,
                "fits": peak <= target.memory,
                "about": stage.about,
            }
        )
    return {
        "device": target.name,
        "count": target.count,
        "source": target.source,
        "dtype": str(target.dtype).removeprefix("torch."),
        "memory_bytes": int(target.memory),
        "weights_bytes": weights,
        "stages": stages,
        "tokens_in": sum(s["tokens_in"] for s in stages),
        "flops": sum(s["flops"] for s in stages),
        "peak_memory_bytes": max(int(s["peak_memory_bytes"]) for s in stages),
        "seconds": sum(s["seconds"] for s in stages),
        "fits": all(s["fits"] for s in stages),
        "changes": _changes(forecast, held, target, sharded),
        "not_counted": forecast.not_counted,
    }


def _changes(forecast: Forecast, held: int, target: Target, sharded: bool) -> list[str]:
    """What to write into the config, or another device, where a stage does not fit."""
    if held > target.memory:
        work, room = forecast.workload, target.memory - target.process_bytes
        needed = next((n for n in range(2, MOST_DEVICES + 1) if work.sharded_bytes(n) <= room), None)
        if needed is None or target.kind == "cpu":
            return [f"the weights alone take {held / GIB:.1f} GiB a device: take a larger device"]
        devices = "" if needed <= target.count else f" and {needed} devices of this kind"
        return [f"model.shard: fsdp2{devices} (the weights, {work.weight_bytes / GIB:.1f} GiB, do not fit one device)"]
    changes: dict[str, str] = {}
    for stage in forecast.stages:
        if held + target.taken(stage.work.extra_bytes) <= target.memory or stage.smaller is None:
            continue
        rows = stage.rows
        while rows > 1 and held + target.taken(stage.smaller(rows)) > target.memory:
            rows //= 2
        if held + target.taken(stage.smaller(rows)) <= target.memory:
            changes[stage.setting] = f"{stage.setting}: {rows}"
        else:
            more = ", model.shard: fsdp2 on more devices" if not sharded and target.kind == "cuda" else ""
            least = (held + target.taken(stage.smaller(1))) / GIB
            changes[stage.setting] = (
                f"{stage.setting}: 1 still needs {least:.1f} GiB; shorter rows, a larger device,"
                f" model.gradient_checkpointing: true{more}"
            )
    return list(changes.values())


# ---- targets


def _named(hardware: Hardware, settings: ModelConfig, count: int) -> Target:
    name = settings.dtype
    if name == "auto":
        name = "bfloat16" if hardware.bfloat16 else "float32"
    rate = hardware.rate(name)
    source = (
        f"{hardware.source}: {rate / EFFICIENCY / 1e12:g} TFLOP/s in {name}, of which {EFFICIENCY:.0%} are counted on;"
        f" {hardware.memory / 1e9:g} GB, of which {USABLE:.0%}"
    )
    dtype = cast(torch.dtype, getattr(torch, name))
    rates = Rates(rate, rate, rate)
    return Target(hardware.name, "cuda", count, USABLE * hardware.memory, 0, dtype, lambda w, f: rates, source)


def _here(settings: ModelConfig, count: int) -> Target:
    device = choose_device(settings.device)
    dtype = automatic_dtype(device) if settings.dtype == "auto" else cast(torch.dtype, getattr(torch, settings.dtype))
    return _on(device, dtype, count, CALIBRATION)


def _on(device: torch.device, dtype: torch.dtype, count: int, seconds: float) -> Target:
    """This machine, its speed measured for so many seconds."""
    there = torch.cuda.device_count() if device.type == "cuda" else 1
    if count > there:
        raise InputError(
            f"this machine has {counted(there, 'device')} of the kind {device.type}",
            where=f"--count {count}",
            fix="name the device that you plan for with --device",
        )
    if device.type == "cuda":
        memory, process = torch.cuda.get_device_properties(device).total_memory, 0
    else:
        memory, process = psutil.virtual_memory().total, 0
    source = f"measured here for {seconds:g} s with {counted(torch.get_num_threads(), 'thread')}"
    return Target(
        f"here ({device})",
        _kind(device),
        count,
        USABLE * memory,
        process or _process_bytes(device),
        dtype,
        lambda workload, forecast: measured_rates(workload, typical_shape(forecast), device, seconds),
        source,
    )


def _kind(device: torch.device) -> Literal["cpu", "cuda"]:
    return "cuda" if device.type == "cuda" else "cpu"


def _process_bytes(device: torch.device) -> int:
    """What this process, with the libraries of a run, holds beside weights: on a CPU it counts."""
    return psutil.Process().memory_info().rss if device.type == "cpu" else 0


def _without_weights(workload: Workload, tokenizer: Any, settings: ModelConfig) -> Base:
    """A base that only encodes: no weights, nothing probed."""
    text: Any = text_config(workload.model.config)
    kinds = layer_types(text)
    sliding = text.sliding_window if "sliding_attention" in kinds else None
    sizes = workload.layers, workload.kv_heads, workload.head_dim, workload.hidden_size, workload.vocab_size
    geometry = Geometry(*sizes, context_window(text), sliding, kinds)
    names: tuple[str, ...] = ("weights", "config", "tokenizer", "chat_template")
    nothing: Any = None
    found = Capability(geometry, 1.0, None, nothing)
    identity = dict.fromkeys(names)
    return Base(
        workload.model, tokenizer, settings.base, torch.device("meta"), workload.dtype, geometry, identity, found
    )
