"""Start from the template's own text, shortened: ``init: extract:N``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from kvopt.config.contexts import Start
from kvopt.config.shortening import ShortText

if TYPE_CHECKING:
    from torch import Tensor

    from kvopt.learning.start_task import StartTask


class ShortenedStart(ShortText, Start):
    """The text as ``kvopt shorten`` finds it."""

    kind: Literal["shortened"] = "shortened"

    def tensor(self, task: StartTask) -> Tensor:
        """The tokens of the text, at their own positions; of a text with more than T tokens (chat markup and literals
        that stay may be longer), those that training rows look at most.
        """
        import torch

        from kvopt.shorten.importance import most_attended

        ids = torch.tensor(list(task.ids), dtype=torch.int64)
        if len(ids) > task.tokens:
            ids = ids[most_attended(task.base, task.ids, task.rows, task.tokens)]
        return task.from_ids(ids)
