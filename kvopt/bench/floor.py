"""What a benchmark's work cannot do without, timed bare in the same run; and how much work fits into a time.

The floor is the matrix products of the backbone's linear layers and of the head on as many tokens as there really are:
no padding, no attention, no norms, no Python between them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kvopt.base.loading import Base

SPENDABLE = 0.8
"""Share of a budget that is planned; the rest is for what a small first run does not show."""

FEW_ROWS = 16
"""Down to so many rows a budget takes away rows; then mutations."""


def products(base: Base, tokens: int, gold: int, *, head_products: int, backward: bool) -> Callable[[], None]:
    """The products of ``tokens`` tokens through the backbone, ``gold`` of them through the head.

    Args:
        head_products: how many products of the head there are (value: 2, with gradient: 3).
        backward: whether the products that carry a gradient to the inputs are included; weights have none.
    """
    layers = [module for module in base.backbone.modules() if isinstance(module, nn.Linear)]
    inputs: dict[int, Tensor] = {}

    def some(features: int) -> Tensor:
        if features not in inputs:
            inputs[features] = torch.randn(tokens, features, device=base.device).to(base.dtype)
        return inputs[features]

    hidden = torch.randn(gold, base.geometry.hidden_size, device=base.device).to(base.head.weight.dtype)

    @torch.no_grad()
    def work() -> None:
        for layer in layers:
            some(layer.in_features) @ layer.weight.T
            if backward:
                some(layer.out_features) @ layer.weight
        for number in range(head_products):
            if number < 2:
                logits = hidden @ base.head.weight.T
            else:
                logits @ base.head.weight

    return work


def fitting_rows(rows: int, row_seconds: float, calls: float, seconds: float) -> int:
    """At most ``rows``, at least 1, of which so many calls take about ``seconds``."""
    return max(1, min(rows, int(SPENDABLE * seconds / max(calls * row_seconds, 1e-9))))


def fitting_scores(mutations: int, rows: int, pair_seconds: float, calls: float, seconds: float) -> tuple[int, int]:
    """(mutations, rows), at most those asked for, whose pairs take about ``seconds``: fewer rows first, then fewer
    mutations, then still fewer rows.
    """
    pairs = fitting_rows(mutations * rows, pair_seconds, calls, seconds)
    if pairs >= mutations * min(rows, FEW_ROWS):
        return mutations, pairs // mutations
    some = max(1, min(mutations, pairs // min(rows, FEW_ROWS)))
    return some, max(1, min(rows, pairs // some))
