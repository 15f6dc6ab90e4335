"""Inline marks for literals that mutations must not change: ``{{keep:exact words}}`` in a template is ``exact words``
in every prompt, and protected like an entry of ``mutations.protect``.

Marked text cannot hold a slot or ``}}``. A template object never holds marks: they are taken out where a template is
read.
"""

from __future__ import annotations

import re

from kvopt.errors import InputError
from kvopt.task.template import Template

MARK = re.compile(r"\{\{keep:(.*?)\}\}", re.DOTALL)


def take_marks(template: Template, *, where: str = "template") -> tuple[Template, tuple[str, ...]]:
    """The template without its marks, and the marked literals in order, each once. Raises InputError for an empty
    mark.
    """
    kept = [literal for field in template.fields for literal in MARK.findall(field)]
    if any(not literal.strip() for literal in kept):
        raise InputError("{{keep:}} marks nothing", where=where, mend="write {{keep:the words to keep}}")
    if not kept:
        return template, ()
    fields = [MARK.sub(lambda match: match[1], field) for field in template.fields]
    return template.with_fields(fields), tuple(dict.fromkeys(kept))
