"""What an operator is, and how a file makes one known.

An operator is a function of a masked field (:class:`kvopt.mutate.spans.Field`) and a random source. It returns the
changed masked text, or None
when it finds nothing to change. Marks (protected spans) may be moved as a whole, never dropped or repeated.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random

from kvopt.mutate.spans import Field

Apply = Callable[[Field, Random], str | None]
RULE_FAMILIES = ("structure", "syntax", "lexical")
FAMILIES = (*RULE_FAMILIES, "paraphrase")
_registered: dict[str, Operator] = {}


@dataclass(frozen=True)
class Operator:
    """A named rewriting rule; ``summary`` is the first line of its docstring."""

    name: str
    family: str
    apply: Apply
    summary: str


def operator(name: str, family: str) -> Callable[[Apply], Apply]:
    """Register the decorated function as the operator ``name`` of ``family``."""

    def decorate(function: Apply) -> Apply:
        if name in _registered or family not in RULE_FAMILIES:
            raise ValueError(f"operator {name!r} of family {family!r}")
        _registered[name] = Operator(name, family, function, (function.__doc__ or "").strip().split("\n")[0])
        return function

    return decorate


@cache
def operators() -> dict[str, Operator]:
    """Every operator by name, in alphabetical order; loads each module of this package."""
    package = importlib.import_module("kvopt.mutate.operators")
    for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_registered.items()))
