"""A griffe extension that reads the docstrings of this project as they are written: roles such as ``:func:`name```
become links, parameters that share a description get an entry each, and indices such as ``R[i][j]`` stay text."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Module, Object

ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`(?P<target>[\w.]+)`")
BRACKETS = re.compile(r"(?P<code>(?P<ticks>`+).+?(?P=ticks))|\]\[", re.DOTALL)  # "][" outside code is no reference
SECTION = re.compile(r"(?:Args|Attributes):$")
SHARED = re.compile(r"(?P<indent> +)(?P<names>\w+(?:, \w+)+):(?P<text>.*)")


class ProjectDocstrings(Extension):
    """Rewrites every docstring once the package is read, before any is parsed."""

    def on_package(self, *, pkg: Module, **kwargs: Any) -> None:
        _rewrite(pkg)


def _rewrite(scope: Object) -> None:
    if scope.docstring is not None:
        text = BRACKETS.sub(lambda match: match["code"] or "]\\[", scope.docstring.value)
        text = ROLE.sub(lambda role: _link(role["target"], scope), text)
        scope.docstring.value = split_shared(text)
    for member in scope.members.values():
        if not member.is_alias:
            _rewrite(member)


def split_shared(docstring: str) -> str:
    """``a, b: what they are`` in a list of parameters or attributes as two entries.

    griffe knows one name an entry, and warns of any that the signature does not have.
    """
    lines = docstring.split("\n")
    written: list[str] = []
    in_section = False
    while lines:
        line = lines.pop(0)
        if line and not line.startswith(" "):
            in_section = bool(SECTION.match(line))
        shared = SHARED.match(line) if in_section else None
        if shared is None:
            written.append(line)
            continue
        further = []
        while lines and lines[0].startswith(shared["indent"] + " "):
            further.append(lines.pop(0))
        for name in shared["names"].split(", "):
            written += [f"{shared['indent']}{name}:{shared['text']}", *further]
    return "\n".join(written)


def _link(target: str, scope: Object) -> str:
    """The name in code, with a link where its page is known. An optional reference: a private name has no page."""
    path = _path(target, scope)
    name = f"<code>{target.lstrip('.')}</code>"
    return f'<autoref optional identifier="{path}">{name}</autoref>' if path else name


def _path(target: str, scope: Object) -> str | None:
    """The dotted path that a docstring of ``scope`` means by ``target``, looked up from the inside out."""
    first, _, rest = target.lstrip(".").partition(".")
    if first == scope.package.name:
        return target
    place: Object | None = scope
    while place is not None:
        if first in place.members:
            member = place.members[first]
            start = member.target_path if member.is_alias else member.path
            return f"{start}.{rest}" if rest else start
        place = place.parent
    return None
