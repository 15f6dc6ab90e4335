r"""Rotary positions of a base: the angles it uses, and moving keys that were already rotated to other positions.

Keys are cached after RoPE. Rotations add up, so keys computed at position p become the keys of position p + s by one
more rotation by s; a prefix can therefore move without being computed again. Symbols: T positions, D head_dim, R <= D
rotated dimensions, s shift.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

Pairing = Literal["half", "interleaved", "none"]
"""Which dimensions turn together: i and i + R/2, or 2i and 2i + 1, or none (a layer without RoPE)."""


_TELLING = (3, 61)
"""Positions at which no two frequencies give the same angle, so that they show how often each angle stands."""


def find_rotary(backbone: nn.Module) -> nn.Module | None:
    """The module that turns positions into cos and sin, or None for a model without one."""
    module = getattr(backbone, "rotary_emb", None)
    return module if isinstance(module, nn.Module) else None


def angles(rotary: nn.Module, positions: Tensor, layer_type: str) -> tuple[Tensor, Tensor]:
    """cos and sin [T, R/2] in float32 (attention scaling included) of integer ``positions`` [T] in layers of
    ``layer_type``."""
    like = torch.zeros(1, dtype=torch.float32, device=positions.device)
    known = torch.tensor(_TELLING, dtype=positions.dtype, device=positions.device)
    asked = torch.cat([positions, known])[None]
    takes_type = "layer_type" in inspect.signature(rotary.forward).parameters
    cos, sin = rotary(like, asked, layer_type) if takes_type else rotary(like, asked)
    cos, sin, told = cos[0, : len(positions)].float(), sin[0, : len(positions)].float(), sin[0, len(positions) :]
    half = told.shape[-1] // 2
    if torch.equal(told[:, :half], told[:, half:]):  # every angle twice: for dimensions i and i + R/2
        return cos[:, :half], sin[:, :half]
    if torch.equal(told[:, ::2], told[:, 1::2]):  # for dimensions 2i and 2i + 1
        return cos[:, ::2], sin[:, ::2]
    return cos, sin  # every angle once


def turn(keys: Tensor, cos: Tensor, sin: Tensor, pairing: Pairing) -> Tensor:
    """Rotate ``keys`` [..., T, D] by the angles ``cos``, ``sin`` ([T or 1, R/2]); dimensions from R on stay. Same
    dtype out."""
    if pairing == "none":
        return keys
    rotated, unrotated = keys[..., : 2 * cos.shape[-1]].float(), keys[..., 2 * cos.shape[-1] :]
    if pairing == "half":
        first, second = rotated.chunk(2, dim=-1)
        out = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    else:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
        out = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    return torch.cat((out.to(keys.dtype), unrotated), dim=-1)


def shift_angles(rotary: nn.Module, shift: int, layer_type: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [1, R/2] of a rotation by ``shift`` positions, without the attention scaling that cached keys
    already carry."""
    cos, sin = angles(rotary, torch.tensor([0, abs(shift)], device=device), layer_type)
    scaling = cos[:1]
    return cos[1:] / scaling, (sin[1:] if shift >= 0 else -sin[1:]) / scaling


@dataclass(frozen=True)
class Rope:
    """How keys rotate in each layer of one base.

    Attributes:
        module: turns positions into cos and sin; the base's own.
        layer_types: the attention kind of each layer, for modules with several sets of angles.
        pairing: which dimensions turn together, by layer.
    """

    module: nn.Module = field(compare=False)
    layer_types: tuple[str, ...]
    pairing: tuple[Pairing, ...]

    def angles(self, positions: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """cos and sin, each [T, R/2] float32 with the attention scaling, at ``positions`` [T] in ``layer``."""
        return angles(self.module, positions, self.layer_types[layer])

    def rotate(self, keys: Tensor, shift: int, layer: int) -> Tensor:
        """Keys [..., T, D] of ``layer`` cached at positions p, as they would be at positions p + ``shift`` (may be
        negative).

        Computed in float32 and differentiable; the dtype of ``keys`` comes out. Positions must stay in the window.
        """
        if shift == 0 or self.pairing[layer] == "none":
            return keys
        cos, sin = shift_angles(self.module, shift, self.layer_types[layer], keys.device)
        return turn(keys, cos, sin, self.pairing[layer])
