"""Start from Gaussian noise of the text's own scale: the weakest baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from kvopt.config.contexts import Start

if TYPE_CHECKING:
    from torch import Tensor

    from kvopt.learning.start_task import StartTask


class Random(Start):
    """Gaussian noise with the standard deviation of the text's states."""

    kind: Literal["random"] = "random"

    def tensor(self, task: StartTask) -> Tensor:
        """Scaled per layer for keys and for values (kv), or overall (soft)."""
        import torch
        from einops import reduce

        like = task.from_ids(list(task.ids)).float()
        if task.kind == "kv":
            std = reduce(like.square(), "t l two h d -> 1 l two 1 1", "mean").sqrt()
        else:
            std = like.square().mean().sqrt()
        drawn = torch.randn(task.tokens, *like.shape[1:], generator=task.generator())
        return drawn.to(like.device) * std
