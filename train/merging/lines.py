"""LiNeS (Wang et al. 2024): scale a student's update by depth after training, δ_l ← (α + β l / (L − 1)) δ_l.

With α < α + β = 1 the first layers go back towards the base and the last stay as trained, which gives back much of what
was forgotten at little cost to the task. Layers are numbered l = 0 … L − 1. Embeddings stand before layer 0 and are
scaled by α, and so is a head that is tied to them; the final norm and a head of its own stand after layer L − 1 and
are scaled by α + β. (The paper's method speaks of layers alone; where the rest belongs is our reading.)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvopt.train.merging.lora_adapter import Adapter
from kvopt.train.student import layer_of

_BEFORE = ("embed", "wte", "wpe")  # parts of the names that embeddings have in transformers


def depth_scale(name: str, layers: int, alpha: float, beta: float) -> float:
    """The factor on the update of a parameter or module of a model with ``layers`` layers. Raises ValueError for a
    layer that the model does not have.
    """
    layer = layer_of(name)
    if layer is None:
        return alpha if any(part in name for part in _BEFORE) else alpha + beta
    if layer >= layers:
        raise ValueError(f"{name} is in layer {layer} of a model with {layers} layers")
    return alpha + beta * layer / max(1, layers - 1)


def scale_adapter(adapter: Adapter, layers: int, alpha: float, beta: float) -> Adapter:
    """The adapter with every B scaled, so that each ΔW = scale · B A is."""
    modules = {}
    for name, factors in adapter.modules.items():
        factor = depth_scale(name, layers, alpha, beta)
        modules[name] = replace(factors, up=factors.up * factor)
    return adapter.with_modules(modules)


def scaled(name: str, student: Tensor, base: Tensor, layers: int, alpha: float, beta: float) -> Tensor:
    """base + factor · (student − base) of one tensor, computed in float32 and kept in the student's dtype.

    A factor of 1 gives back the student's own values and a factor of 0 the base's.
    """
    if not student.is_floating_point():
        return student
    factor = depth_scale(name, layers, alpha, beta)
    return torch.lerp(base.float(), student.float(), factor).to(student.dtype)
