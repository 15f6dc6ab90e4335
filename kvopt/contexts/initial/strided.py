"""Start from T tokens evenly spread over the text, the first among them (it is the attention sink)."""

import torch
from torch import Tensor

from kvopt.attention import Prefix
from kvopt.contexts.initial.task import InitialTask
from kvopt.rope import rotate_keys


def strided(task: InitialTask) -> Tensor:
    """Every (P/T)-th of P tokens; kept keys are re-rotated by T − P, so that bodies at position T see them at their
    old distances.
    """
    ids = task.full_ids()
    keep = torch.linspace(0, len(ids) - 1, task.tokens).round().long().to(ids.device)
    if task.kind == "soft":
        return task.from_ids(ids[keep])
    prefix = task.text_prefix()
    shift = task.tokens - len(ids)
    keys = tuple(rotate_keys(k[:, keep], shift, layer, task.base) for layer, k in enumerate(prefix.keys))
    return Prefix(keys, tuple(v[:, keep] for v in prefix.values)).stack()
