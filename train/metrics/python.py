"""A user's own metric: a Python function of one answer.

``python:package.module:function`` or ``python:path/to/file.py:function`` (relative to the config file) names a function
``f(answer: str, gold: str, values: dict[str, str])`` that returns a bool, a number, or a dict of names to those.
The value reported is the mean over answers; with a dict, the first name is the one that tables show.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, PrivateAttr

from kvopt.config.metrics import Item, Metric, Verdict
from kvopt.errors import InputError

Function = Callable[[str, str, dict[str, str]], Any]


class PythonFunction(Metric):
    """The mean of a Python function f(answer, gold, values) over answers."""

    kind: Literal["python"]
    target: str = Field(description="python:package.module:function or python:path/to/file.py:function")
    pass_or_fail: ClassVar[bool] = True
    _function: Function = PrivateAttr()

    @property
    def label(self) -> str:
        """How results call it: by default as the function is called."""
        return self.name or re.sub(r"[^A-Za-z0-9_-]", "-", self.target.rpartition(":")[2]) or "python"

    def prepared(self, base_dir: Path) -> PythonFunction:
        """With the function loaded."""
        loaded = self.model_copy()
        loaded._function = load_function(self.target, base_dir)
        return loaded

    def verdict(self, item: Item) -> Verdict:
        """What the function returns, by name. Raises InputError where it fails or gives no number."""
        try:
            value = self._function(item.answer, item.gold, dict(item.values))
        except Exception as error:  # the user's code may raise anything, and it is the user's to fix
            what = f"raised {type(error).__name__} on the answer to {item.example_id}: {error}"
            raise InputError(what, where=self.target) from error
        if value == {}:
            raise InputError(f"gave an empty dict for the answer to {item.example_id}", where=self.target)
        if not isinstance(value, dict):
            return Verdict({self.label: (self._number(value, item), 1.0)})
        return Verdict({f"{self.label}.{key}": (self._number(part, item), 1.0) for key, part in value.items()})

    def _number(self, value: Any, item: Item) -> float:
        if isinstance(value, bool | int | float) and math.isfinite(value):
            return float(value)
        what = f"gave {value!r} for the answer to {item.example_id}"
        raise InputError(what, where=self.target, fix="return a bool, a finite number, or a dict of names to those")


def load_function(target: str, base_dir: Path) -> Function:
    """The function that ``python:MODULE_OR_FILE:FUNCTION`` names. Raises InputError."""
    place, _, attribute = target.removeprefix("python:").rpartition(":")
    if not place or not attribute:
        raise InputError(
            "names no function", where=target, fix="write python:module:function or python:file.py:function"
        )
    module = _from_file(base_dir / place, target) if place.endswith(".py") else _imported(place, target)
    function = getattr(module, attribute, None)
    if not callable(function):
        what = f"{place} has no function {attribute!r}"
        raise InputError(what, where=target, fix="define it as f(answer, gold, values)")
    return function


def _from_file(path: Path, target: str) -> Any:
    if not path.is_file():
        raise InputError(f"no such file: {path.resolve()}", where=target, fix="paths are relative to the config file")
    spec = importlib.util.spec_from_file_location(f"kvopt_metric_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's file may raise anything while it is loaded
        raise InputError(f"cannot be loaded: {type(error).__name__}: {error}", where=target) from error
    return module


def _imported(name: str, target: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # as above
        raise InputError(f"cannot be imported: {type(error).__name__}: {error}", where=target) from error
