"""From what pydantic finds wrong in a document to one line: what, where, and how to put it right."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from kvopt.errors import InputError

Checked = TypeVar("Checked", bound=BaseModel)


def build_model(model: type[Checked], tree: dict[str, Any], where: str) -> Checked:
    """A parsed document as the checked ``model``. Raises InputError, one line, for the first thing that is wrong."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise _input_error(error, where, model) from None


_PLAIN = {
    "missing": "is missing",
    "model_type": "is not a mapping of keys",
    "model_attributes_type": "is not a mapping of keys",
    "dict_type": "is not a mapping of keys",
    "list_type": "is not a list",
    "tuple_type": "is not a list",
    "string_type": "is not text (write it in quotes)",
}


def _input_error(error: ValidationError, where: str, model: type[BaseModel]) -> InputError:
    """One line about the first fault; unknown keys come first, because a missing key is often a misspelt one."""
    faults = sorted(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    first = faults[0]
    place = _place(first["loc"], model)
    key = ".".join(str(part) for part, _ in place)
    more = f"; and {len(faults) - 1} more" if len(faults) > 1 else ""
    if first["type"] == "extra_forbidden":
        known = list(place[-1][1])
        close = difflib.get_close_matches(str(place[-1][0]), known, n=1)
        fix = f"did you mean {close[0]!r}?" if close else "known here: " + ", ".join(known)
        return InputError(f"unknown key {key!r}{more}", where=where, fix=fix)
    if first["type"].startswith("union_tag"):
        context = first.get("ctx", {})
        key += "." + context.get("discriminator", "kind").strip("'")
        given = f"unknown value {context['tag']!r}" if "tag" in context else "is missing"
        return InputError(f"{key}: {given}{more}", where=where, fix=f"one of {context.get('expected_tags', _TAGS)}")
    given = (
        "" if first["type"] == "missing" or isinstance(first["input"], dict | list) else f" (given: {_short(first)})"
    )
    message = _PLAIN.get(first["type"]) or re.sub(r"^Value error, ", "", first["msg"])
    return InputError(f"{key + ': ' if key else ''}{message}{given}{more}", where=where)


_TAGS = "none, local, endpoint, file"


def _short(fault: Any) -> str:
    text = repr(fault["input"])
    return text if len(text) <= 80 else text[:77] + "..."


def _place(location: Sequence[int | str], model: type[BaseModel]) -> list[tuple[int | str, tuple[str, ...]]]:
    """Each part of the way to a fault with the keys known there; what pydantic adds (tags of unions) is left out."""
    place: list[tuple[int | str, tuple[str, ...]]] = []
    models: list[Any] = [model]
    for part in location:
        fields: dict[str, Any] = {}
        for model in models:
            fields |= model.model_fields
        if len(models) > 1 and isinstance(part, str):  # the tag that says which of several models it is
            models = [m for m in models if part in getattr(m.model_fields["kind"].annotation, "__args__", ())]
            continue
        if part in fields:
            models = list(_models_in(fields[part].annotation))
        place.append((part, tuple(fields)))
    return place


def _models_in(annotation: Any) -> Iterable[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from _models_in(inner)
