"""Start from random words of the vocabulary: the baseline that says what real text is worth."""

import torch
from torch import Tensor

from kvopt.contexts.initial.task import InitialTask


def random_text(task: InitialTask) -> Tensor:
    """T random ordinary tokens, prefilled (kv) or embedded (soft); the first is the text's own first token, the
    attention sink.
    """
    ordinary = torch.tensor(sorted(set(range(len(task.base.tokenizer))) - set(task.base.tokenizer.all_special_ids)))
    ids = ordinary[torch.randint(len(ordinary), (task.tokens,), generator=task.generator())]
    if task.ids:
        ids[0] = task.ids[0]
    return task.from_ids(ids.to(task.base.device))
