"""What a call from Python gives, as sections of a config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvopt.errors import InputError

TemplateLike = str | Sequence[Mapping[str, str]]
"""Text with ``{{slots}}``, or chat messages (``{"role", "content"}``)."""


def template_section(template: TemplateLike) -> dict[str, Any]:
    """The ``template`` section. Raises InputError for what is neither text nor messages."""
    if isinstance(template, str):
        return {"text": template}
    if not isinstance(template, Sequence):
        raise InputError(f"must be text or chat messages, not {template!r}", where="template")
    example = '{"role": "user", "content": "…"}'
    return {"messages": [dict(mapping(m, f"template.{i}", example)) for i, m in enumerate(template)]}


def settings_of(settings: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Further sections, as in YAML. Raises InputError for what is no mapping."""
    return mapping(settings or {}, "settings", '{"data": {"output": "label"}}')


def mapping(value: object, where: str, example: str) -> Mapping[str, Any]:
    """``value``, which must be a mapping such as ``example``. Raises InputError."""
    if not isinstance(value, Mapping):
        raise InputError(f"must be a mapping, not {value!r}", where=where, fix=f"such as {example}")
    return value


def laid_over(tree: dict[str, Any], sections: Mapping[str, Any]) -> dict[str, Any]:
    """``tree`` with a caller's sections: their keys are laid over those of a section that is there."""
    laid = dict(tree)
    for name, section in sections.items():
        there = laid.get(name)
        laid[name] = {**there, **section} if isinstance(section, Mapping) and isinstance(there, dict) else section
    return laid
