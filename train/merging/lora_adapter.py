"""A LoRA student as numbers: for each module the factors of its update ΔW = scale · B A.

Symbols: r rank, I and O the module's input and output width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvopt.errors import InputError
from kvopt.storage.files import parsed_json, write_json

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_A, _B = ".lora_A.weight", ".lora_B.weight"
_WRAPPER = "base_model.model."  # what PEFT puts in front of a module's own name


@dataclass(frozen=True)
class Factors:
    """One module's update: ``down`` A [r, I], ``up`` B [O, r], and the factor on B A."""

    down: Tensor
    up: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def product(self) -> Tensor:
        """ΔW [O, I] in float64."""
        return self.scale * (self.up.double() @ self.down.double())


@dataclass(frozen=True)
class Adapter:
    """The adapter of a student folder: PEFT's config as it stands in the file, and the factors of each module."""

    config: Mapping[str, Any]
    modules: Mapping[str, Factors]

    def with_modules(self, modules: Mapping[str, Factors], **config: Any) -> Adapter:
        return replace(self, modules=modules, config={**self.config, **config})


def read_adapter(folder: Path) -> Adapter:
    """Read a LoRA adapter folder. Raises InputError for another kind of adapter, or one whose update is not a sum of
    products B A alone (DoRA, biases, whole modules saved with it).
    """
    try:
        config = parsed_json((folder / CONFIG).read_text("utf-8"))
        tensors = load_file(str(folder / TENSORS))
    except FileNotFoundError as error:
        raise InputError(f"has no {Path(error.filename or TENSORS).name}", where=str(folder)) from None
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"cannot be read as an adapter: {error}", where=str(folder)) from None
    if config.get("peft_type") != "LORA":
        raise InputError(f"is an adapter of type {config.get('peft_type')}, not a LoRA student", where=str(folder))
    if config.get("alpha_pattern"):
        raise InputError("its lora_alpha differs between modules (alpha_pattern), which is not read", where=str(folder))
    names = [name.removesuffix(_A) for name in tensors if name.endswith(_A)]
    known = {name + end for name in names for end in (_A, _B)}
    if strange := sorted(known ^ set(tensors)):
        raise InputError(
            f"holds {strange[0]}, which is no LoRA factor of a linear layer",
            where=str(folder),
            fix="train without DoRA, biases and modules_to_save",
        )
    return Adapter(config, {name: _factors(tensors[name + _A], tensors[name + _B], config) for name in sorted(names)})


def _factors(down: Tensor, up: Tensor, config: Mapping[str, Any]) -> Factors:
    rank = down.shape[0]
    return Factors(down, up, config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank))


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """Write config and tensors into an existing folder. Raises ValueError for values that are not finite."""
    tensors = {}
    for name, factors in adapter.modules.items():
        tensors[name + _A], tensors[name + _B] = factors.down.contiguous(), factors.up.contiguous()
    if wrong := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        raise ValueError(f"{wrong[0]} has values that are not finite; refusing to write {folder}")
    write_json(folder / CONFIG, dict(adapter.config))
    save_file(tensors, str(folder / TENSORS), metadata={"format": "pt"})


def average(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """The adapter whose update is Σ wᵢ ΔWᵢ, exactly: factors stand side by side, so its rank is the sum of the ranks.

    The average of the factors would be another model: (ΣB)(ΣA) holds products of different students. A module that
    only some students have counts as 0 in the others.
    """
    names = _names(adapters)
    total = max(sum(factors.rank for factors in _of(adapters, name)) for name in names)
    modules = {name: _side_by_side(adapters, weights, name, total) for name in names}
    changed: dict[str, Any] = {"r": total, "lora_alpha": total, "use_rslora": False, "rank_pattern": {}}
    if any(list(adapter.modules) != names for adapter in adapters):
        targets = [name.removeprefix(_WRAPPER) for name in names]
        changed |= {"target_modules": targets, "layers_to_transform": None, "layers_pattern": None}
    return adapters[0].with_modules(modules, **changed)


def _names(adapters: Sequence[Adapter]) -> list[str]:
    return sorted({name for adapter in adapters for name in adapter.modules})


def _of(adapters: Sequence[Adapter], name: str) -> Iterable[Factors]:
    return (adapter.modules[name] for adapter in adapters if name in adapter.modules)


def _side_by_side(adapters: Sequence[Adapter], weights: Sequence[float], name: str, rank: int) -> Factors:
    """Factors of rank ``rank`` (zeros where it is more than needed) whose product is the weighted sum."""
    first = next(iter(_of(adapters, name)))
    widths = {(factors.up.shape[0], factors.down.shape[1]) for factors in _of(adapters, name)}
    if len(widths) > 1:
        raise InputError(f"{name} has another shape in one of the adapters", fix="leave out students of another base")
    down = torch.zeros(rank, first.down.shape[1])
    up = torch.zeros(first.up.shape[0], rank)
    start = 0
    for adapter, weight in zip(adapters, weights, strict=True):
        if (factors := adapter.modules.get(name)) is not None:
            end = start + factors.rank
            down[start:end] = factors.down
            up[:, start:end] = weight * factors.scale * factors.up.float()
            start = end
    return Factors(down, up, 1.0)


def truncate(adapter: Adapter, rank: int) -> tuple[Adapter, float]:
    """The closest adapter of rank ``rank`` (truncated SVD of each ΔW), and what it loses: ‖ΔW − ΔW_r‖ / ‖ΔW‖ over all
    modules together, Frobenius.
    """
    lost = whole = 0.0
    modules = {}
    for name, factors in adapter.modules.items():
        q_up, r_up = torch.linalg.qr(factors.up.double() * factors.scale)
        q_down, r_down = torch.linalg.qr(factors.down.double().T)
        left, sizes, right = torch.linalg.svd(r_up @ r_down.T)
        kept = sizes[:rank].sqrt()
        up = torch.zeros(factors.up.shape[0], rank)
        down = torch.zeros(rank, factors.down.shape[1])
        up[:, : len(kept)] = (q_up @ left[:, : len(kept)] * kept).float()
        down[: len(kept)] = (kept[:, None] * (right[: len(kept)] @ q_down.T)).float()
        modules[name] = Factors(down, up, 1.0)
        lost += float(sizes[rank:].square().sum())
        whole += float(sizes.square().sum())
    changed = adapter.with_modules(modules, r=rank, lora_alpha=rank, use_rslora=False, rank_pattern={})
    return changed, math.sqrt(lost / whole) if whole else 0.0
