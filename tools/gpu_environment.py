"""What the parts of ``tools/gpu_check.sh`` share beside their reports: arguments, versions, memory on the device."""

from __future__ import annotations

import argparse
import gc
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "liger-kernel", "flash-linear-attention")
GIB = 2**30


def options(parser: argparse.ArgumentParser) -> None:
    """The arguments of every part."""
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=150.0, help="time that the part may plan with")


def environment(device: str) -> dict[str, str]:
    """The device and the versions that the figures belong to; a package that is missing is left out."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else platform.machine()
    found = {"device": name, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def free_memory() -> None:
    """Give back what nothing refers to any more, after a variant that may have run out of memory."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
