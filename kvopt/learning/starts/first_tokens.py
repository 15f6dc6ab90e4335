"""Start from the first T tokens of a text: the template, a mutation, or a file (Cartridges' recipe)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from kvopt.config.contexts import Start

if TYPE_CHECKING:
    from torch import Tensor

    from kvopt.learning.start_task import StartTask


class FirstTokens(Start):
    """The first tokens of the text; ``init: template``, ``text:FILE`` and mutations are this start on other texts."""

    kind: Literal["first-tokens"] = "first-tokens"

    def tensor(self, task: StartTask) -> Tensor:
        """The keys and values (or embeddings) of ``task.ids[:T]``, at their own positions."""
        return task.from_ids(task.full_ids()[: task.tokens])
