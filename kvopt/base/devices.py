"""One notion of a device: which one a name means, what it computes in, and random numbers that are its own.

Everything that a run puts on a device goes where ``Base.device`` says; nothing relies on torch's current device, but it
is set as well, for the libraries that do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kvopt.errors import InputError, counted

KINDS = ("cpu", "cuda", "mps", "xpu")
"""Kinds of devices that kvopt computes on; ROCm's are called cuda in torch."""
FIRST_WITH_BFLOAT16 = 8
"""Major compute capability of the first NVIDIA GPUs that multiply in bfloat16 (Ampere)."""


def choose_device(name: str) -> torch.device:
    """The torch device of ``name``, with its index where there can be several, or the best one for "auto": cuda, else
    xpu, else mps, else cpu. It becomes torch's current device.

    Raises InputError for one that is not there, and for a kind that kvopt does not compute on.
    """
    where = f"model.device {name}"
    if name == "auto":
        name = next((kind for kind in ("cuda", "xpu", "mps") if _count(kind)), "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(
            "is no device", where=where, fix="give auto, cpu, cuda, mps or xpu; cuda:1 is the second of several"
        ) from None
    if device.type not in KINDS:
        raise InputError(f"kvopt does not compute on {device.type}", where=where, fix=f"use {', '.join(KINDS)} or auto")
    if device.type == "cpu":
        return torch.device("cpu")
    count = _count(device.type)
    if count == 0:
        raise InputError(f"torch {torch.__version__} sees no {device.type} device", where=where, fix="use auto or cpu")
    if (device.index or 0) >= count:
        last = f"{device.type}:{count - 1}"
        there = f"{counted(count, f'{device.type} device')}, {device.type}:0" + (f" to {last}" if count > 1 else "")
        raise InputError(f"there is no such device: torch sees {there}", where=where, fix=f"use {last}")
    return _current(device, where)


def _count(kind: str) -> int:
    """Devices of a kind that torch can use."""
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    module = getattr(torch, kind)
    return int(module.device_count()) if module.is_available() else 0


def _current(device: torch.device, where: str) -> torch.device:
    """The device with its index, made torch's current one and tried once."""
    try:
        if device.type in ("cuda", "xpu"):
            module = getattr(torch, device.type)
            device = torch.device(device.type, module.current_device() if device.index is None else device.index)
            module.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:200]
        raise InputError(f"cannot be used: {reason}", where=where, fix="use auto or cpu") from error
    return device


def check_gpus(name: str, processes: int) -> None:
    """Each of so many processes of this machine needs a GPU of its own. Raises InputError where there are fewer, and
    for a name that says which GPU.
    """
    if ":" in name:
        what = f"is one device for {counted(processes, 'process', 'processes')}"
        raise InputError(what, where=f"model.device {name}", fix="use auto: each process takes a GPU of its own")
    if processes > (there := torch.cuda.device_count()):
        what = f"{counted(processes, 'process', 'processes')} on a machine with {counted(there, 'GPU')}"
        raise InputError(what, fix=f"launch at most {there}, or set model.device: cpu")


def device_name(device: torch.device) -> str:
    """``cuda:1 (NVIDIA H100)``: the device as messages name it."""
    if device.type in ("cuda", "xpu"):
        return f"{device} ({getattr(torch, device.type).get_device_name(device)})"
    return str(device)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies in bfloat16; elsewhere it is emulated, or is not there at all."""
    if device.type == "cuda":
        if torch.version.hip:
            return torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.cuda.get_device_capability(device)[0] >= FIRST_WITH_BFLOAT16
    if device.type == "xpu":
        return torch.xpu.is_bf16_supported(including_emulation=False)
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, lambda: False)() for name in names)


def automatic_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies in it, else float32."""
    return torch.bfloat16 if has_bfloat16(device) else torch.float32


def dtype_warning(device: torch.device, dtype: torch.dtype, automatic: bool) -> str | None:
    """What to say of a GPU that does not multiply in bfloat16, None where there is nothing to say."""
    if device.type not in ("cuda", "xpu") or has_bfloat16(device):
        return None
    if automatic:
        return f"{device_name(device)} does not compute in bfloat16: model.dtype is {str(dtype).removeprefix('torch.')}"
    if dtype == torch.bfloat16:
        return f"{device_name(device)} emulates bfloat16, slowly: model.dtype: float32 may be faster"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: torch's of a GPU, Python's, and that of torch's allocator on a CPU,
    which has no type of its own.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Draws inside come from ``seed``, on the CPU and on ``device``; outside, every generator goes on as if nothing had
    been drawn. Other devices are left alone.

    ``torch.manual_seed`` would seed every GPU of the machine, and ``fork_rng`` alone would not bring them back.
    """
    on_cpu = torch.random.get_rng_state()
    module = None if device.type == "cpu" else torch.get_device_module(device)
    place = () if device.type == "mps" else (device,)
    on_device = module.get_rng_state(*place) if module else None
    try:
        torch.random.default_generator.manual_seed(seed)
        if module:
            _seed_device(module, device, seed)
        yield
    finally:
        torch.random.set_rng_state(on_cpu)
        if module:
            module.set_rng_state(on_device, *place)


def _seed_device(module: object, device: torch.device, seed: int) -> None:
    """Seed the generator of one device alone."""
    if device.type == "mps":
        torch.mps.manual_seed(seed)
        return
    with module.device(device):  # type: ignore[attr-defined]
        module.manual_seed(seed)  # type: ignore[attr-defined]
