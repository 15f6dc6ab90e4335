"""How contexts are named: one grammar for the config, the command line and Python.

``original``, ``none``; ``best-mutations:K`` (also diverse, spread, random); ``text:FILE``; ``mutations:FILE``;
``mutation:NAME``; ``context:NAME``; ``RUN#NAME``; and plain names: a mutation (``m031``), a learned context, a folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from kvopt.errors import InputError

NestedOrder = Literal["best", "diverse", "random"]
"""In what order mutations are taken: lowest KL first, different wordings first, or by chance."""
Order = Literal["best", "diverse", "spread", "random"]
"""Those, and evenly over all from the lowest KL to the highest, where the first K are no part of the first K + 1."""
ORDERS: tuple[Order, ...] = get_args(Order)
SUFFIX = "-mutations"
MUTATION = re.compile(r"m\d{3,}")

Form = Literal["original", "none", "counted", "text", "mutations", "mutation", "context", "of-run", "plain"]
FORMS: dict[Form, str] = {
    "original": "original",
    "none": "none",
    "counted": ", ".join(f"{order}{SUFFIX}:K" for order in ORDERS),
    "text": "text:FILE",
    "mutations": "mutations:FILE",
    "mutation": "a mutation's name",
    "context": "context:NAME",
    "of-run": "RUN#NAME",
    "plain": "a context folder",
}
"""Every form with how messages and help spell it."""
_PREFIXED: tuple[Form, ...] = ("text", "mutations", "mutation", "context")


@dataclass(frozen=True)
class ContextName:
    """A context's name, taken apart.

    Attributes:
        spec: as it was written.
        form: which of FORMS it is.
        argument: the file, name or folder in it; empty for ``original``, ``none`` and counted forms.
        order, count: of a counted form.
        run: the run directory of ``RUN#NAME``.
    """

    spec: str
    form: Form
    argument: str = ""
    order: Order = "best"
    count: int = 0
    run: str = ""

    @classmethod
    def parse(cls, spec: str, where: str) -> ContextName:
        """The parts of ``spec``. Raises InputError, at ``where``, for a form whose argument is missing."""
        if spec in ("original", "none"):
            return cls(spec, spec)  # type: ignore[arg-type]
        head, colon, argument = spec.partition(":")
        if order := next((order for order in ORDERS if head == order + SUFFIX), None):
            if not argument.isdecimal() or int(argument) < 1:
                raise InputError(f"{spec!r} needs a number", where=where, fix=f"write {head}:4")
            return cls(spec, "counted", order=order, count=int(argument))
        if form := next((form for form in _PREFIXED if colon and head == form), None):
            if not argument:
                raise InputError(f"{spec!r} names nothing", where=where, fix=f"write {head}:… in full")
            return cls(spec, form, argument)
        run, mark, name = spec.rpartition("#")
        if mark and run and name:
            return cls(spec, "of-run", name, run=run)
        if MUTATION.fullmatch(spec):
            return cls(spec, "mutation", spec)
        return cls(spec, "plain", spec)


def unknown_context(spec: str, where: str, names: Iterable[str] = (), forms: Iterable[Form] = FORMS) -> InputError:
    """The one error for a context that is not there, with all that could be named: ``names`` that exist, and forms."""
    known = ", ".join(dict.fromkeys(names))
    others = ", ".join(FORMS[form] for form in forms)
    return InputError(f"no context {spec!r}", where=where, fix=f"known: {known}; or {others}" if known else others)
