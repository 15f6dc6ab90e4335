"""Start from Gaussian noise of the text's own scale: the weakest baseline."""

import torch
from einops import reduce
from torch import Tensor

from kvopt.contexts.initial.task import InitialTask


def noise(task: InitialTask) -> Tensor:
    """Normal numbers with the standard deviation of the text's states, per layer for keys and for values (kv) or
    overall (soft).
    """
    ids = torch.tensor(list(task.ids), dtype=torch.int64, device=task.base.device)
    like = task.from_ids(ids).float()
    if task.kind == "kv":
        std = reduce(like.square(), "t l two h d -> 1 l two 1 1", "mean").sqrt()
    else:
        std = like.square().mean().sqrt()
    drawn = torch.randn(task.tokens, *like.shape[1:], generator=task.generator())
    return drawn.to(like.device) * std
