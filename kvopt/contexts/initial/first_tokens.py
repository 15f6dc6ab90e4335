"""Start from the first T tokens of a text: the template, a mutation, or a file (Cartridges' recipe)."""

from torch import Tensor

from kvopt.contexts.initial.task import InitialTask


def first_tokens(task: InitialTask) -> Tensor:
    """The keys and values (or embeddings) of ``task.ids[:T]``, at their own positions."""
    return task.from_ids(task.full_ids()[: task.tokens])
