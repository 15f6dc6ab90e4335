"""What a mutation operator is.

An operator is a function of a masked field (:class:`kvopt.mutate.spans.Field`) and a random source. It returns the
changed masked text, or None when it finds nothing to change. Marks (protected spans) may be moved as a whole, never
dropped or repeated. A file of ``kvopt/mutate/operators`` holds one, or a pair that undo each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random

from kvopt.config.mutations import FAMILIES, OPERATORS
from kvopt.mutate.spans import Field

Apply = Callable[[Field, Random], str | None]
RULE_FAMILIES = FAMILIES[:-1]


@dataclass(frozen=True)
class Operator:
    """A named rewriting rule; ``summary`` is the first line of its docstring."""

    name: str
    family: str
    apply: Apply
    summary: str


def operator(name: str, family: str) -> Callable[[Apply], Operator]:
    """Make the decorated function the operator ``name`` of ``family``; its file makes it known."""
    if family not in RULE_FAMILIES:
        raise ValueError(f"operator {name!r} of family {family!r}; families are {', '.join(RULE_FAMILIES)}")

    def decorate(function: Apply) -> Operator:
        return Operator(name, family, function, (function.__doc__ or "").strip().split("\n")[0])

    return decorate


@cache
def operators() -> dict[str, Operator]:
    """Every operator by name, in alphabetical order. Raises ValueError for two of one name."""
    listed = [member for member in OPERATORS.values() if isinstance(member, Operator)]
    by_name = {rule.name: rule for rule in listed}
    if len(by_name) < len(listed):
        raise ValueError("two operators have the same name")
    return dict(sorted(by_name.items()))
