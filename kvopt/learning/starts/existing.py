"""Start from another context: one of this run or a folder; a soft prompt can be prefilled into a KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from kvopt.config.contexts import Start
from kvopt.errors import InputError, counted

if TYPE_CHECKING:
    from torch import Tensor

    from kvopt.learning.start_task import StartTask


class Existing(Start):
    """Another context, written ``init: context:NAME``."""

    kind: Literal["existing"] = "existing"

    def tensor(self, task: StartTask) -> Tensor:
        """The source's own tensor, or the keys and values that a soft source leaves behind. Raises InputError when
        lengths or kinds do not fit.
        """
        source = task.source
        where = f"contexts.{task.name}"
        if source is None:
            raise InputError("init: context:NAME names no context", where=where)
        if source.tokens != task.tokens:
            raise InputError(
                f"{source.name} has {counted(source.tokens, 'slot')}, {task.tokens} wanted",
                where=where,
                fix="leave tokens out",
            )
        if source.kind == task.kind:
            return source.tensor.to(task.base.device)
        if task.kind == "soft":
            raise InputError("a KV cache cannot be turned into a soft prompt", where=where, fix="start it from text")
        return task.prefilled(source.tensor)
