"""A benchmark's time budget: how many tokens and rounds fit into it, from the measured time of one small head product.

Symbols: N tokens, D hidden size, V vocabulary; a "product" is hidden [N, D] times the head [V, D] transposed.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch

from kvopt.kernels.plan import cpu_has_bfloat16_products

FEWEST_TOKENS = 64
FEW_TOKENS = 256
"""Below this many tokens a budget takes fewer rounds rather than fewer tokens."""

PRODUCTS_A_CALL = 7
"""What value and gradient of a contender take, in products, the product that is timed beside it included."""

SPENDABLE = 0.6
"""Share of a budget that is planned; first calls, compilation and error measurements take the rest."""


def now() -> float:
    """Seconds, of the clock that all times of a benchmark are taken from."""
    return time.perf_counter()


def wait_for(device: torch.device) -> None:
    """Wait until the device has done everything that it was asked for; a GPU works on behind the caller's back."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Budget:
    """``seconds`` from when it is made; None is no limit."""

    seconds: float | None
    begun: float = field(default_factory=lambda: now())

    @property
    def left(self) -> float:
        """Seconds that are left, infinite without a limit; never below 0."""
        return math.inf if self.seconds is None else max(0.0, self.seconds - (now() - self.begun))


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies in it; elsewhere it is emulated, ten times slower than float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if cpu_has_bfloat16_products() else torch.float32


def fitting(tokens: int, rounds: int, contenders: int, token_seconds: float, seconds: float) -> tuple[int, int]:
    """(tokens, rounds), at most those asked for, with which so many contenders take about ``seconds``.

    Args:
        token_seconds: time of one product divided by its tokens.
    """
    if math.isinf(seconds):
        return tokens, rounds

    def most(rounds: int) -> int:
        calls = max(1, contenders) * (rounds + 2) * PRODUCTS_A_CALL
        return int(SPENDABLE * seconds / max(calls * token_seconds, 1e-12))

    if most(rounds) < min(tokens, FEW_TOKENS):
        rounds = min(rounds, 3)
    return max(min(FEWEST_TOKENS, tokens), min(tokens, most(rounds))), rounds
