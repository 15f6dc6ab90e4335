"""Placeholders and blocks of other template languages, which stay text in a kvopt template: named, with kvopt's form.

Mustache and Handlebars (``{{{x}}}``, ``{{#if x}}``), Jinja and nunjucks (``{{ x | filter }}``, ``{% if x %}``,
``{# … #}``), f-strings and LangChain (``{x}``), string.Template and JavaScript (``${x}``), DSPy (``[[ ## x ## ]]``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from kvopt.errors import InputError
from kvopt.task.template import SLOT, Template

SHOWN = 4  # how many a warning names
_NAME = r"[^\W\d][\w.\-]*"
_TRIPLE = re.compile(rf"(?<!\\)\{{\{{\{{\s*({_NAME})\s*\}}\}}\}}")
_LOOK_ALIKE = re.compile(
    r"""
    (?P<block>\{%.*?%\})
    | (?P<comment>\{\#.*?\#\})
    | (?P<field>\[\[\s*\#\#\s*[\w ]+\s*\#\#\s*\]\])
    | (?P<double>\{\{.+?\}\})
    | (?P<dollar>\$\{\s*[^\W\d][\w.]*\s*\})
    | (?P<single>(?<![{$\\])\{[^\W\d]\w*\}(?!\}))
    """,
    re.VERBOSE | re.DOTALL,
)


def foreign_placeholders(template: Template, where: str = "template") -> list[str]:
    """One warning for all of a template's placeholders that are none to kvopt; none where there are none."""
    found = dict(pair for source in template.fields for pair in _found(source))
    if not found:
        return []
    forms: dict[str, list[str]] = {}
    for text, how in list(found.items())[:SHOWN]:
        forms.setdefault(how, []).append(_cut(text))
    named = "; ".join(f"{', '.join(texts)} ({how})" for how, texts in forms.items())
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return [f"{where}: kvopt feeds as it stands {named}{more}; set template.literal: true if it is meant as text"]


def _found(source: str) -> Iterator[tuple[str, str]]:
    """What looks like a placeholder and is no slot, each with the form that kvopt knows."""
    for match in _TRIPLE.finditer(source):
        yield match[0], f"a brace is left on each side of the value; a slot is {{{{{match[1]}}}}}"
    rest = SLOT.sub("\0", _TRIPLE.sub("\0", source))
    for match in _LOOK_ALIKE.finditer(rest):
        if "\0" in match[0] and match.lastgroup not in ("block", "comment"):
            continue
        yield match[0].replace("\0", "…"), _form(str(match.lastgroup), match[0])


def _form(kind: str, text: str) -> str:
    if kind == "block":
        return "a block is not run; write the text that it gives, or make its result a column and a slot"
    if kind == "comment":
        return "a comment is not left out; take it out"
    if kind == "field":
        return "DSPy's mark of a field; the field's value is a slot, {{name}}"
    if kind == "double":
        inside = text[2:-2]
        if re.match(r"\s*[\"']", inside):
            return "two braces stay two; write one where an f-string or LangChain writes two"
        if re.match(r"\s*[#/^>!&]", inside):
            return "a block is not run; write the text that it gives, or make its result a column and a slot"
        return f"a slot is a name of ASCII letters, digits, _ . and -: {{{{{_ascii(inside)}}}}}"
    return f"a slot is {{{{{_ascii(text.strip('${} '))}}}}}"


def _ascii(inside: str) -> str:
    """The nearest slot name to a foreign expression."""
    name = re.sub(r"[^A-Za-z0-9_]+", "_", re.split(r"[|(]", inside)[0].strip()).strip("_")
    return name if re.match(r"[A-Za-z_]", name) else "name"


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 40 else text[:39] + "…"


def refuse_foreign_file(value: Any, where: str) -> None:
    """Raises InputError for a JSON or YAML value that another tool keeps its prompts in, naming what to take out."""
    if not isinstance(value, Mapping):
        return
    if ("lc" in value and "kwargs" in value) or value.get("_type") in ("prompt", "few_shot", "chat"):
        raise InputError(
            "is a LangChain prompt",
            where=where,
            fix="write its messages as [{role: …, content: …}], or its template as text, with {{slot}} for {slot}",
        )
    if "prompts" in value and ("providers" in value or "tests" in value):
        raise InputError(
            "is a promptfoo config", where=where, fix="give the file of one of its prompts: text, or chat messages"
        )
    if any(_is_dspy(part) for part in (value, *value.values())):
        raise InputError(
            "is a DSPy program",
            where=where,
            fix="write its instructions as the system message, and its input fields as slots of the user message",
        )


def _is_dspy(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("signature"), Mapping | list) and "demos" in part
