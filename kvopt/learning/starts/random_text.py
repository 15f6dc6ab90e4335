"""Start from random words of the vocabulary: the baseline that says what real text is worth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from kvopt.config.contexts import Start

if TYPE_CHECKING:
    from torch import Tensor

    from kvopt.learning.start_task import StartTask


class RandomText(Start):
    """Random ordinary tokens after the text's own first one, which is the attention sink."""

    kind: Literal["random-text"] = "random-text"

    def tensor(self, task: StartTask) -> Tensor:
        """T tokens, prefilled (kv) or embedded (soft)."""
        import torch

        tokenizer = task.base.tokenizer
        ordinary = torch.tensor(sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)))
        ids = ordinary[torch.randint(len(ordinary), (task.tokens,), generator=task.generator())]
        if task.ids:
            ids[0] = task.ids[0]
        return task.from_ids(ids)
