"""``prefix.safetensors``: a KV prefix as named tensors, which the formats for transformers and vLLM share."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from kvopt.export.source import fp32
from kvopt.storage.files import write_bytes

FILE = "prefix.safetensors"
"""Layers count from 0; keys are rotated for positions 0 and up."""


def write_prefix(states: Tensor, place: Path) -> None:
    """``prefix.safetensors`` of states [T, L, 2, H, d]: ``layers.i.keys`` and ``layers.i.values`` [H, T, d] in fp32."""
    tensors = {}
    for layer in range(states.shape[1]):
        tensors[f"layers.{layer}.keys"] = fp32(states[:, layer, 0].transpose(0, 1))
        tensors[f"layers.{layer}.values"] = fp32(states[:, layer, 1].transpose(0, 1))
    write_bytes(place / "prefix.safetensors", save(tensors, metadata={"format": "pt"}))
