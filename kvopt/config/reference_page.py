"""The config reference in Markdown, made from the schema: ``kvopt config --reference``, ``docs/config.md``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from kvopt.config.document import Config

INTRODUCTION = """# Config reference

`kvopt config --reference` writes this page from the schema; do not edit it by hand. A config is one YAML file. A key
that kvopt does not know is an error, with a suggestion. Paths are relative to the config file. `--set a.b=value`
changes one value from the command line (`--set contexts.NAME.steps=50` finds a list item by its name). The words are
explained in the [glossary](concepts.md#glossary).
"""


def reference() -> str:
    """Markdown with one table for each section of the config."""
    schema = Config.model_json_schema()
    parts = [INTRODUCTION]
    for title, anchor, node in _sections(schema):
        parts.append(f"## {title}\n{_lead(node)}\n{_table(node, schema, anchor)}")
    return "\n".join(parts).rstrip() + "\n"


def _sections(schema: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(heading, path, object schema) of the top level, then of every object under it, each once."""
    yield "Top level", "", schema
    seen: set[str] = set()
    waiting = [(name, node) for name, node in schema["properties"].items()]
    while waiting:
        path, node = waiting.pop(0)
        for name in _names(node):
            if name in seen:
                continue
            seen.add(name)
            target = schema["$defs"][name]
            if target.get("type") != "object":
                continue
            kind = target["properties"].get("kind", {})
            tag = kind.get("const") or kind.get("default") if "const" in kind else None
            yield f"`{path}`" + (f" with `kind: {tag}`" if tag else ""), path, target
            waiting += [(f"{path}.{key}", child) for key, child in target["properties"].items()]


def _names(node: dict[str, Any]) -> list[str]:
    """Names of the definitions that a schema refers to, in order."""
    names = [node["$ref"].rsplit("/", 1)[-1]] if "$ref" in node else []
    for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
        names += [name for part in node.get(key, []) for name in _names(part)]
    for key in ("items", "additionalProperties"):
        if isinstance(node.get(key), dict):
            names += _names(node[key])
    return names


def _lead(node: dict[str, Any]) -> str:
    text = (node.get("description") or "").split("\n\n")[0]
    return f"\n{' '.join(text.split())}\n" if text else ""


def _table(node: dict[str, Any], schema: dict[str, Any], path: str) -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    required = set(node.get("required", ()))
    for name, field in node.get("properties", {}).items():
        default = "required" if name in required else _default(field.get("default"))
        meaning = " ".join(field.get("description", "").split()).replace("|", "\\|")
        lines.append(f"| `{name}` | {_type(field, schema)} | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _default(value: Any) -> str:
    if isinstance(value, dict):
        return ""
    return f"`{json.dumps(value)}`" if value is not None else ""


def _type(field: dict[str, Any], schema: dict[str, Any]) -> str:
    if "$ref" in field:
        name = field["$ref"].rsplit("/", 1)[-1]
        target = schema["$defs"][name]
        return "section" if target.get("type") == "object" else _type(target, schema)
    for key in ("anyOf", "oneOf"):
        if key in field:
            kinds = [_type(part, schema) for part in field[key] if part.get("type") != "null"]
            return " or ".join(dict.fromkeys(kinds))
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    if field.get("type") == "array":
        return f"list of {_type(field['items'], schema)}" if "items" in field else "list"
    return _named(field) + _bounds(field)


def _named(field: dict[str, Any]) -> str:
    names = {"string": "text", "object": "mapping", "boolean": "true or false"}
    kind = field.get("type", "any")
    return names.get(kind, kind)


def _bounds(field: dict[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {field[key]}" for key, sign in signs.items() if key in field]
    return " " + " and ".join(bounds) if bounds else ""
