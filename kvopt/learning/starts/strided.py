"""Start from T tokens evenly spread over the text, the first among them (it is the attention sink)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from kvopt.config.contexts import Start

if TYPE_CHECKING:
    from torch import Tensor

    from kvopt.learning.start_task import StartTask


class Strided(Start):
    """Every (P/T)-th of the text's P tokens."""

    kind: Literal["strided"] = "strided"

    def tensor(self, task: StartTask) -> Tensor:
        """Kept keys are re-rotated by T − P, so that bodies at position T see them at their old distances."""
        import torch

        ids = task.full_ids()
        keep = torch.linspace(0, len(ids) - 1, task.tokens).round().long().to(ids.device)
        return task.keeping(ids, keep)
