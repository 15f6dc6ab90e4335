"""Start from attention matching: the keys whose loss would change most of what the task's own queries read, and values
refitted so that attention reads what it read from the whole text (:mod:`kvopt.contexts.compaction`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from kvopt.config.contexts import Start
from kvopt.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from kvopt.learning.start_task import StartTask


class Matched(Start):
    """Attention matching over the text, for KV caches."""

    kind: Literal["matched"] = "matched"
    version: ClassVar[int] = 2
    ridge: float = Field(0.001, gt=0, description="of the fit of values, relative to a slot's mean squared attention")
    queries: int = Field(16384, ge=1, description="of bodies that are looked at, per layer and key/value head, at most")
    key_steps: int = Field(
        0,
        ge=0,
        description="of descent on the kept keys, layer by layer (KVSculpt); 40 double the time, and help where a tenth"
        " of the slots or fewer stay",
    )

    def tensor(self, task: StartTask) -> Tensor:
        """Keys kept per layer and head (slot 0 always), values refitted, keys re-rotated by T − P. Raises InputError
        for soft prompts.
        """
        from kvopt.contexts.compaction import fewer_slots

        if task.kind != "kv":
            raise InputError(
                "init: matched works on keys and values",
                where=f"contexts.{task.name}",
                fix="use kind: kv, or another init",
            )
        options = {"ridge": self.ridge, "queries": self.queries, "seed": task.seed, "key_steps": self.key_steps}
        return fewer_slots(task.base, task.text_prefix(), task.tokens, task.rows, **options)  # type: ignore[arg-type]
