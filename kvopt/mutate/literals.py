"""What a template's wording may not lose or invent when somebody writes it anew: the literals that the task needs.

A rule changes one thing and must leave every mark of the text as it was (:mod:`kvopt.mutate.validity`). A person or a
large model that writes a whole wording lays it out anew: headings, tags, numbered sections, JSON, quotes of its own, a
rule in another message. So here a literal (a label, key, number, example, path, format line) has to stand in the prompt
once, wherever; white space, the quotes around it, and how often do not count. What the author marked, with
``{{keep:…}}`` or ``mutations.protect``, stays as often as it was. New text is refused where it would change the
answer: another number, another name of a format.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kvopt.mutate.spans import find_spans
from kvopt.task.template import SLOT, Template

FORMATS = frozenset({"JSON", "JSONL", "XML", "YAML", "CSV", "TSV", "HTML", "LaTeX", "SQL", "TOML", "Markdown"})
"""Names of output formats: one that the original does not name is another demand."""
NEEDED = ("user", "code", "fence", "url", "path", "format", "number", "identifier", "json", "quoted", "listed", "table")
NAMES = ("caps", "tag")
"""Kinds that are as often layout as content: they are needed where a gold answer could hold them."""
LABELS_OF_PARTS = re.compile(
    r"(?:\b(?:section|step|rule|part|article|clause|item|point|note|question|chapter|paragraph|no|line)\b\.?|§|[#(\[])"
    r"[ \t]*(\d{1,3})\b(?:\.\d+)*|^[\W_]*(\d{1,3})(?:\.\d+)*[.):\]]",
    re.I | re.M,
)
LABELS_OF_SLOTS = re.compile(r"(?<![\w.])(\d{1,2})[ \t]*[:=.)\]][\s\"'“‘«`<\[]*\{\{")
"""``Word 1: {{first}}``: a number that names an input, one of as many as there are."""
NUMBER = re.compile(r"(?<![\w.])\d+(?:[.,]\d+)*")


@dataclass(frozen=True)
class NeededLiteral:
    """A literal of a template: its ``text``, the ``kind`` of protected span, and how often at ``least`` it must stand
    in the whole prompt.
    """

    text: str
    kind: str
    least: int = 1


def needed_literals(template: Template, protect: Sequence[re.Pattern[str]] = ()) -> list[NeededLiteral]:
    """What every wording of the template must hold, in the template's order."""
    whole = _whole(template)
    found: dict[str, NeededLiteral] = {}
    for span in find_spans(whole, protect):
        text = whole[span.start : span.end]
        if span.slot:
            for part in SLOT.split(text)[::3] if span.kind == "fence" else ():
                for fence in re.findall(r"(?:```|~~~)\w*", part):
                    found.setdefault(fence, NeededLiteral(fence, "fence"))
            continue
        if span.kind == "user":
            found[text] = NeededLiteral(text, "user", whole.count(text))
        elif span.kind in NEEDED:
            bare = text.rstrip(".,;:") if span.kind in ("path", "url", "number", "identifier") else _bare(text)
            found.setdefault(bare, NeededLiteral(bare, span.kind))
        elif span.kind in NAMES and text in FORMATS:
            found.setdefault(text, NeededLiteral(text, span.kind))
    return [literal for literal in found.values() if literal.text]


def lost_literal(template: Template, candidate: Template, protect: Sequence[re.Pattern[str]] = ()) -> str | None:
    """What the candidate lost of the template's literals, in words; None for nothing."""
    whole = _whole(candidate)
    for literal in needed_literals(template, protect):
        has = whole.count(literal.text) if literal.least > 1 or literal.kind == "user" else _stands(literal, whole)
        if has < literal.least:
            times = "is missing" if literal.least == 1 else f"is there {has} times instead of {literal.least}"
            return f"{literal.text!r} {times}"
    return None


def invented_literal(template: Template, candidate: Template) -> str | None:
    """What the candidate has that would change the answer and that the template has not, in words; None for nothing."""
    before, after = _whole(template), _whole(candidate)
    for name in sorted(FORMATS):
        found = re.compile(rf"\b{name}\b", re.I)
        if found.search(after) and not found.search(before):
            return f"{name} is new: another format"
    labels = {match.start(group) for match in LABELS_OF_PARTS.finditer(after) for group in (1, 2) if match[group]}
    inputs = len(candidate.slot_sequence)
    labels |= {match.start(1) for match in LABELS_OF_SLOTS.finditer(after) if 1 <= int(match[1]) <= inputs}
    known = set(NUMBER.findall(before))
    for match in NUMBER.finditer(after):
        if match[0] not in known and match.start() not in labels:
            return f"the number {match[0]} is new"
    return None


def _whole(template: Template) -> str:
    return "\n".join(template.fields)


def _bare(text: str) -> str:
    """Without quotes around it."""
    return text.strip().strip("\"'“”«»‘’")


def _stands(literal: NeededLiteral, whole: str) -> int:
    """How often it stands there, not as part of a longer word; with white space in it whether, its layout aside."""
    if re.search(r"\s", literal.text) or literal.kind == "json":
        squeezed = re.sub(r"[\s\\]+", "", whole)
        return int(re.sub(r"[\s\\]+", "", literal.text) in squeezed)
    return occurrences(whole, literal.text)


def occurrences(text: str, literal: str) -> int:
    """How often ``literal`` stands alone in ``text`` (not as part of a longer word)."""
    before = r"(?<!\w)" if re.match(r"\w", literal) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", literal) else ""
    return len(re.findall(before + re.escape(literal) + after, text))
