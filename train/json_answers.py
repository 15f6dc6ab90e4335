"""Answers that should be JSON: strict parsing, and the key/value pairs of a value."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any, NoReturn

from kvopt.config.metrics import Ratio

DEEPEST = 64
"""Levels of objects and lists in one another; what has more is no answer but a model that goes round in circles."""


class NotJSON(ValueError):
    """The text is no JSON value."""


def parse_json(text: str) -> Any:
    """The value of ``text``, which must be JSON and nothing else (space around it apart). Raises NotJSON, also for
    more than :data:`DEEPEST` levels.
    """
    try:
        value = json.loads(text.strip(), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise NotJSON(str(error)) from None
    level = [value]
    for _ in range(DEEPEST):
        level = [inner for outer in level for inner in _inside(outer)]
    if any(isinstance(inner, dict | list) for inner in level):
        raise NotJSON(f"more than {DEEPEST} levels")
    return value


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def same_value(one: str, other: str) -> bool:
    """Whether two texts are equal, space around them apart, or are the same JSON value (order of keys apart)."""
    if one.strip() == other.strip():
        return True
    try:
        return canonical(parse_json(one)) == canonical(parse_json(other))
    except NotJSON:
        return False


def canonical(value: Any) -> str:
    """One spelling of a JSON value; 1 and true differ, 1 and 1.0 do not."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{canonical(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(canonical, value)) + "]"
    return json.dumps(value)


def pairs_of(value: Any, *, ignore_case: bool = False) -> Counter[tuple[str, str]]:
    """Every leaf of a JSON value with the dotted path of its keys, counted; items of a list share their list's path."""
    pairs: Counter[tuple[str, str]] = Counter()
    _collect(value, "", pairs, ignore_case)
    return pairs


def _collect(value: Any, path: str, pairs: Counter[tuple[str, str]], ignore_case: bool) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _collect(inner, f"{path}.{key}" if path else key, pairs, ignore_case)
    elif isinstance(value, list):
        for inner in value:
            _collect(inner, path, pairs, ignore_case)
    else:
        text = value.strip() if isinstance(value, str) else canonical(value)
        pairs[path, text.casefold() if ignore_case else text] += 1


def at_path(value: Any, path: str | None) -> Any:
    """The part of a JSON value under a dotted ``path`` of keys (None: all of it); ``{}`` where there is none."""
    for key in path.split(".") if path else ():
        value = value.get(key, {}) if isinstance(value, dict) else {}
    return value


def agreement(answers: Sequence[Sequence[str]]) -> list[Ratio]:
    """For each example: pairs of contexts whose answers agree, and pairs of contexts; ``answers[c][i]`` is context c's
    answer to example i. Answers agree when they are the same text (space around it apart) or the same JSON value.
    """
    pairs = list(combinations(range(len(answers)), 2))
    return [
        (float(sum(same_value(answers[a][i], answers[b][i]) for a, b in pairs)), float(len(pairs)))
        for i in range(len(answers[0]))
    ]
