"""Model soups (Wortsman et al. 2022): one student that is the average of several over the same base.

The uniform soup takes all. The greedy soup goes through them from the best to the worst by a validation metric and
keeps each one that does not make the soup worse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Measure = Callable[[Sequence[int]], float]


@dataclass(frozen=True)
class Greedy:
    """The members chosen, in the order of their choice, the soup's value, and every soup that was measured."""

    members: tuple[int, ...]
    value: float
    tried: tuple[dict[str, Any], ...]


def greedy_soup(count: int, measure: Measure, *, higher_is_better: bool = False) -> Greedy:
    """Choose among ``count`` students.

    Args:
        count: at least one.
        measure: the validation value of the uniform average of some of them, given by their positions.
        higher_is_better: False for a loss, the default.
    """
    sign = -1.0 if higher_is_better else 1.0
    tried: list[dict[str, Any]] = []

    def value_of(members: tuple[int, ...]) -> float:
        value = measure(members)
        tried.append({"members": list(members), "value": value})
        return value

    alone = [value_of((i,)) for i in range(count)]
    order = sorted(range(count), key=lambda i: (sign * alone[i], i))
    members: tuple[int, ...] = (order[0],)
    best = alone[order[0]]
    for candidate in order[1:]:
        value = value_of((*members, candidate))
        if sign * value <= sign * best:
            members, best = (*members, candidate), value
    return Greedy(members, best, tuple(tried))


def average_tensors(tensors: Sequence[Tensor]) -> Tensor:
    """The mean of the same tensor of several students, in float64, in the first one's dtype; the first one's itself
    where it holds no real numbers.
    """
    first = tensors[0]
    if not first.is_floating_point():
        return first
    total = torch.zeros_like(first, dtype=torch.float64)
    for tensor in tensors:
        total += tensor
    return (total / len(tensors)).to(first.dtype)
