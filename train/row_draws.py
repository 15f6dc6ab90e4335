"""What is drawn for a single row of the training stream: the slots of its context that it sees, and its other wording.

A draw is a function of the seed and of the row's position in the stream alone, so micro-batches, several processes and
a resumed run draw what one process draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvopt.train.stream import generator


def seen_slots(positions: Sequence[int], slots: int, dropout: float, seed: int) -> Tensor:
    """Context dropout: the slots that the rows at these positions see, [B, slots] bool; each is dropped with
    probability ``dropout``. A dropped slot gets no attention; the others, and the positions of the row, stay where they
    are.
    """
    drawn = [torch.rand(slots, generator=generator("context-dropout", seed, position)) for position in positions]
    return torch.stack(drawn) >= dropout


def other_context(weights: Sequence[float], context: int, position: int, seed: int) -> int:
    """A context beside the one that the row at this position meets, drawn in proportion to the weights."""
    left = torch.tensor(weights, dtype=torch.float64)
    left[context] = 0
    return int(torch.multinomial(left, 1, generator=generator("other-wording", seed, position)))
