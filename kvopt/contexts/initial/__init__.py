"""Where a learned context starts. One small file an initialiser; :func:`initial_tensor` finds it by its name in the
config.

Real text beats noise (Cartridges, arXiv 2506.06266, ablation of initialisations), and attention matching beats plain
text.
"""

from __future__ import annotations

from torch import Tensor

from kvopt.contexts.initial.existing import existing
from kvopt.contexts.initial.first_tokens import first_tokens
from kvopt.contexts.initial.matched import matched
from kvopt.contexts.initial.noise import noise
from kvopt.contexts.initial.random_text import random_text
from kvopt.contexts.initial.strided import strided
from kvopt.contexts.initial.task import Initialiser, InitialTask
from kvopt.errors import InputError

INITIALISERS: dict[str, Initialiser] = {
    "template": first_tokens,
    "text": first_tokens,
    "mutation": first_tokens,
    "best-mutation": first_tokens,
    "strided": strided,
    "matched": matched,
    "random-text": random_text,
    "random": noise,
    "context": existing,
}
# What stands after the colon in ``init: text:FILE``; the others take nothing.
WITH_ARGUMENT = {"text": "a file", "mutation": "a mutation's name", "context": "a context's name or folder"}

__all__ = ["INITIALISERS", "WITH_ARGUMENT", "InitialTask", "initial_tensor", "split_spec"]


def split_spec(spec: str, where: str = "init") -> tuple[str, str]:
    """``"text:FILE"`` → ``("text", "FILE")``. Raises InputError for an unknown initialiser or a missing or needless
    argument.
    """
    name, _, argument = spec.partition(":")
    if name not in INITIALISERS:
        raise InputError(f"unknown init {spec!r}", where=where, mend="one of " + ", ".join(INITIALISERS))
    if (name in WITH_ARGUMENT) != bool(argument):
        wanted = f"{name}:… needs {WITH_ARGUMENT[name]}" if name in WITH_ARGUMENT else f"{name} takes no argument"
        raise InputError(f"init {spec!r}: {wanted}", where=where)
    return name, argument


def initial_tensor(spec: str, task: InitialTask) -> Tensor:
    """The starting value of a context, fp32: kv [T, L, 2, H, d], soft [T, D]."""
    return INITIALISERS[split_spec(spec, task.name)[0]](task).float().contiguous()
