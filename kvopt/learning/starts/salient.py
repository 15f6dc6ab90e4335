"""Start from the T tokens of the text that training rows look at most, in their order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from kvopt.config.contexts import Start

if TYPE_CHECKING:
    from torch import Tensor

    from kvopt.learning.start_task import StartTask


class Salient(Start):
    """The tokens with the largest attention weight that any row's body gives them, in any layer and head."""

    kind: Literal["salient"] = "salient"
    rows: int = Field(32, ge=1, description="training rows that are looked at, at most")

    def tensor(self, task: StartTask) -> Tensor:
        """The first token (the attention sink) and the most salient others; kept keys are re-rotated by T − P, so that
        bodies at position T see them at their old distances to the end.
        """
        from kvopt.shorten.importance import most_attended

        ids = task.full_ids()
        keep = most_attended(task.base, ids.tolist(), task.rows[: self.rows], task.tokens)
        return task.keeping(ids, keep.to(ids.device))
