"""Start from another context: one of this run or a folder; a soft prompt can be prefilled into a KV cache."""

import torch
from torch import Tensor

from kvopt.attention import prefill
from kvopt.contexts.context import KVContext
from kvopt.contexts.initial.task import InitialTask
from kvopt.errors import InputError


def existing(task: InitialTask) -> Tensor:
    """The source's own tensor, or the keys and values that a soft source leaves behind. Raises InputError when lengths
    or kinds do not fit.
    """
    source = task.source
    where = f"contexts.{task.name}"
    if source is None:
        raise InputError("init: context:NAME names no context", where=where)
    if source.tokens != task.tokens:
        raise InputError(
            f"{source.name} has {source.tokens} slots, {task.tokens} wanted", where=where, mend="leave tokens out"
        )
    if isinstance(source, KVContext):
        if task.kind == "soft":
            raise InputError("a KV cache cannot be turned into a soft prompt", where=where, mend="start it from text")
        return source.states.to(task.base.device)
    if task.kind == "soft":
        return source.embeddings.to(task.base.device)
    with torch.no_grad():
        return prefill(task.base, embeddings=source.embeddings.to(task.base.device, task.base.dtype)).stack()
