"""Reading YAML strictly (no key twice), and the ``--set a.b=value`` assignments that change it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from kvopt.errors import InputError
from kvopt.storage.files import read_text


def read_tree(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The parsed document of a YAML file after ``overrides``. Raises InputError."""
    text = read_text(path, "kvopt init writes a starter config")
    tree = _parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise InputError("is not a mapping of sections", where=str(path), fix="kvopt init writes a starter config")
    for override in overrides:
        _assign(tree, override)
    return tree


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping (YAML would silently keep the last), and text that is none."""

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        try:
            str(value).encode("utf-8")
        except UnicodeEncodeError:
            what = "half of a surrogate pair is not a character"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark) from None
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # <<: *anchor; keys beside it may stand in it too
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(f"not valid YAML: {error.problem}", where=f"{where}{line}") from None
    except yaml.YAMLError as error:
        raise InputError(f"not valid YAML: {str(error).splitlines()[0]}", where=where) from None
    except (RecursionError, ValueError) as error:  # ValueError: dates that do not exist
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InputError(f"not valid YAML: {reason}", where=where) from None


def _assign(tree: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise InputError(f"{override!r} is not an assignment", where="--set", fix="write --set a.b=value")
    node: Any = tree
    keys = path.split(".")
    while len(keys) > 1:
        if isinstance(node, list):
            keys = _joined_name(node, keys)
            if len(keys) == 1:
                break
        node = _child(node, keys.pop(0), path)
    if isinstance(node, list):
        node[_position(node, keys[-1], path)] = _parse_yaml(value, f"--set {path}")
    elif isinstance(node, dict):
        node[keys[-1]] = _parse_yaml(value, f"--set {path}")
    else:
        raise InputError(f"{path} leads into a plain value", where="--set")


def _joined_name(items: list[Any], keys: list[str]) -> list[str]:
    """Names of list items may hold dots: the leading keys that together are one are joined."""
    names = {item["name"] for item in items if isinstance(item, dict) and isinstance(item.get("name"), str)}
    for end in range(len(keys), 1, -1):
        if ".".join(keys[:end]) in names:
            return [".".join(keys[:end]), *keys[end:]]
    return keys


def _child(node: Any, key: str, path: str) -> Any:
    if isinstance(node, list):
        return node[_position(node, key, path)]
    if not isinstance(node, dict):
        raise InputError(f"{path} leads into a plain value", where="--set")
    if node.get(key) is None:
        node[key] = {}
    return node[key]


def _position(items: list[Any], key: str, path: str) -> int:
    for position, item in enumerate(items):
        if key == str(position) or (isinstance(item, dict) and item.get("name") == key):
            return position
    raise InputError(f"{path}: no item {key!r}", where="--set", fix="use an item's name or its position from 0")
