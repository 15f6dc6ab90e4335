"""Protected spans: the parts of a template that no operator and no model may change, and the masked text that they work
on.

A field is masked by putting one private-use character (a *mark*) in the place of each protected span. Operators see and
rearrange marks but never what they stand for; :meth:`Field.unmask` refuses a text in which a mark was lost, doubled
or invented.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvopt.config.mutations import protected_pattern
from kvopt.errors import InputError
from kvopt.mutate.vocabulary import EMPHASIS, HEADINGS, SECTION_TAGS
from kvopt.task.template import SLOT

FIRST_MARK = 0xF0000
LAST_MARK = 0xFFFFD
MARK = f"[{chr(FIRST_MARK)}-{chr(LAST_MARK)}]"
"""Regex class of the characters that stand for protected spans."""

LONGEST_JSON = 4000

PATTERNS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(pattern, flags))
    for kind, pattern, flags in [
        ("private", f"{MARK}+", 0),
        ("fence", r"^[ \t]*(```|~~~)[^\n]*\n(?:.*?^[ \t]*\1[`~]*[ \t]*$|.*\Z)", re.M | re.S),
        ("table", r"^[ \t]*\|.*\|[ \t]*$", re.M),
        ("code", r"``[^\n]+?``|`[^`\n]+`", 0),
        ("url", r"\b(?:https?|ftp|file)://[^\s<>\"')\]]*[^\s<>\"')\].,;:!?]|\bwww\.[^\s<>\"')\]]*\w", 0),
        ("url", r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+", 0),
        ("path", r"(?<![\w<])(?:~|\.{1,2})?/[\w.-]+(?:/[\w.-]+)+|\b\w+/\w+\.\w+\b", 0),
        ("tag", r"<\|[^|\n]{1,60}\|>|</?[A-Za-z][^<>\n]{0,120}>|<[A-Z_ ]{2,40}>", 0),
        ("format", r"%\(\w+\)[a-zA-Z]|%[sdrfxi](?!\w)|\$\w+|\\[A-Za-z\"'\\]|[%$]", 0),
        ("number", r"(?<![\w.])[€£]?\w*\d\w*(?:[.,:/–-]\d+)*[%°]?", 0),
        ("identifier", r"\b[A-Z]?[a-z]+[A-Z]\w*|\b\w*\w_\w+|\b_\w+|\b[A-Z]{2,}[a-z]\w*", 0),
        ("identifier", r"\b[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+\b|\b\w+\([^()\n]{0,80}\)|(?<!\w)--[A-Za-z][\w-]*|(?<!\w)[@#]\w+", 0),  # noqa: E501
        ("caps", r"\b[A-Z]{2,}(?:[-&][A-Z]+)*\b", 0),
        ("letter", r"(?<![\w'’])[B-HJ-Z](?![\w'’])", 0),
    ]
)  # fmt: skip
LISTED = re.compile(
    r"\b(?:one of|either|labels?|categor(?:y|ies)|class(?:es)?|options|choices|values|tags|intents?|keys|fields)\b[^:\n.\"]{0,40}:[ \t]*"  # noqa: E501
    r"([\w-]+(?: (?!or\b|and\b)[\w-]+)?(?:, (?:or |and )?[\w-]+(?: (?!or\b|and\b)[\w-]+)?)+"
    r"(?:,? (?:or|and) [\w-]+(?: [\w-]+)?)?)(?=[.;\s]|$)",
    re.I,
)
QUOTES = re.compile(
    r"\"([^\"\n]{1,160})\"|“([^”\n]{1,160})”|«([^»\n]{1,160})»|(?<![\w'])'([^'\n]{1,120})'(?!\w)|(?<!\w)‘([^’\n]{1,120})’(?!\w)"
)
NUMBERED = re.compile(r"^[ \t]*\(?(\d{1,3})[.)][ \t]+(?=\S)", re.M)
OPENING = re.compile(r"[\[{]")
SPACES = re.compile(r"\s")


@dataclass(frozen=True)
class Span:
    """``source[start:end]`` is protected because it is a ``kind``; ``slot`` when a slot is in it."""

    start: int
    end: int
    kind: str
    slot: bool = False


def compile_protect(protect: Sequence[str]) -> tuple[re.Pattern[str], ...]:
    """The user's literals (plain, or ``re:PATTERN``). Raises InputError for an empty one or a broken pattern."""
    try:
        return tuple(protected_pattern(entry) for entry in protect)
    except ValueError as error:
        raise InputError(str(error), where="mutations.protect", fix="name the text that must not change") from None


def numbering(source: str) -> list[tuple[int, int]]:
    """Where the markers of numbered lists are (``1. `` … in sequence): structure, not literals."""
    markers: list[tuple[int, int]] = []
    previous: tuple[int, int, int] | None = None
    for match in NUMBERED.finditer(source):
        number = int(match[1])
        if previous and number == previous[0] + 1:
            if previous[0] == 1:
                markers.append(previous[1:])
            markers.append(match.span())
            previous = (number, *match.span())
        elif number == 1:
            previous = (1, *match.span())
        else:
            previous = None
    return markers


def _braces(source: str) -> Iterator[Span]:
    """Balanced JSON-like objects and arrays; a brace that does not close is protected alone."""
    position = 0
    while opening := OPENING.search(source, position):
        start = opening.start()
        position = start + 1
        if source[start] == "[" and not re.match(r"\[\s*(?:[\"{\[\d]|true|false|null)", source[start : start + 40]):
            continue
        depth = 0
        for end in range(start, min(len(source), start + LONGEST_JSON)):
            depth += (source[end] in "[{") - (source[end] in "]}")
            if depth == 0:
                yield Span(start, end + 1, "json")
                position = end + 1
                break
    for index, character in enumerate(source):
        if character in "{}":
            yield Span(index, index + 1, "brace")


def _quoted(source: str) -> Iterator[Span]:
    """Quoted words with their quotes; of a quoted phrase only what is inside, so that the style of the quotes can
    change.
    """
    for match in QUOTES.finditer(source):
        group = match.lastindex or 0
        phrase = SPACES.search(match[group]) and not source[match.end() :].lstrip().startswith(":")
        yield Span(*(match.span(group) if phrase else match.span()), "quoted")


def _listed(source: str) -> Iterator[Span]:
    """The items of ``one of: a, b or c``, labels even when they are plain words."""
    for match in LISTED.finditer(source):
        for item in re.finditer(r"(?:^|, (?:or |and )?|,? (?:or|and) )([\w-]+(?: (?!or\b|and\b)[\w-]+)?)", match[1]):
            yield Span(match.start(1) + item.start(1), match.start(1) + item.end(1), "listed")


def _all_spans(source: str, protect: Sequence[re.Pattern[str]]) -> Iterator[Span]:
    for match in SLOT.finditer(source):
        yield Span(*match.span(), "slot", slot=not match[1])
    for pattern in protect:
        for match in pattern.finditer(source):
            if match[0]:
                yield Span(*match.span(), "user")
    markers = numbering(source)
    for kind, pattern in PATTERNS:
        for match in pattern.finditer(source):
            if kind == "number" and any(start <= match.start() < end for start, end in markers):
                continue
            if kind == "caps" and (match[0] in EMPHASIS or match[0].lower() in HEADINGS.words):
                continue
            if kind == "tag" and match[0].strip("</>") in SECTION_TAGS:
                continue
            yield Span(*match.span(), kind)
    yield from _braces(source)
    yield from _quoted(source)
    yield from _listed(source)


def find_spans(source: str, protect: Sequence[re.Pattern[str]] = ()) -> list[Span]:
    """The protected spans of template source in order, overlapping ones joined."""
    merged: list[Span] = []
    for span in sorted(_all_spans(source, protect), key=lambda s: (s.start, -s.end)):
        if merged and span.start < merged[-1].end:
            last = merged[-1]
            merged[-1] = Span(last.start, max(last.end, span.end), last.kind, last.slot or span.slot)
        else:
            merged.append(span)
    return merged


class MarkError(ValueError):
    """A masked text lost, doubled, moved or invented a mark."""


@dataclass(frozen=True)
class Field:
    """One template field as an operator sees it.

    Attributes:
        text: the source, each protected span one mark; from the first slot on a single mark under ``scope: leading``.
        literals: ``literals[i]`` is the source that mark ``chr(FIRST_MARK + i)`` stands for.
        slots: the marks that stand for slots.
        fixed_end: the last mark must stay the last character.
    """

    text: str
    literals: tuple[str, ...]
    slots: frozenset[str] = frozenset()
    fixed_end: bool = False

    @property
    def newline(self) -> str:
        """The field's own line ending."""
        return "\r\n" if "\r\n" in self.text else "\n"

    @property
    def editable(self) -> bool:
        """Whether an operator has any letters to work on."""
        return any(character.isalpha() for character in self.text)

    def holds_slot(self, text: str) -> bool:
        """Whether masked ``text`` has a slot in it."""
        return any(mark in text for mark in self.slots)

    def unmasked(self, mark: str) -> str:
        """The literal that one mark stands for."""
        return self.literals[ord(mark) - FIRST_MARK]

    def ends_sentence(self, text: str) -> bool:
        """Whether masked ``text``, quotes and what its marks stand for included, ends with a full stop or the like."""
        plain = re.sub(MARK, lambda match: self.unmasked(match[0]), text)
        return plain.rstrip().rstrip("\"'”’»)*`").endswith((".", "!", "?"))

    def unmask(self, text: str) -> str:
        """The template source of a changed masked text. Raises MarkError unless each mark is there exactly once (and
        the last one last).
        """
        marks = Counter(character for character in text if FIRST_MARK <= ord(character) <= LAST_MARK)
        if marks != Counter(chr(FIRST_MARK + i) for i in range(len(self.literals))):
            raise MarkError("a protected span was lost, doubled or invented")
        if self.fixed_end and not text.endswith(chr(FIRST_MARK + len(self.literals) - 1)):
            raise MarkError("text was put after the first slot")
        return re.sub(MARK, lambda match: self.literals[ord(match[0]) - FIRST_MARK], text)


def mask(source: str, editable: int, protect: Sequence[re.Pattern[str]] = ()) -> Field:
    """Mask a template field of which only ``source[:editable]`` may change (``len(source)`` for all of it)."""
    spans = [s for s in find_spans(source, protect) if s.start < editable]
    if editable < len(source):
        if spans and spans[-1].end >= editable:
            spans[-1] = Span(spans[-1].start, len(source), spans[-1].kind, True)
        else:
            spans.append(Span(editable, len(source), "tail", True))
    if len(spans) > LAST_MARK - FIRST_MARK:
        spans = [Span(0, len(source), "too many", True)]
    text, end, slots = "", 0, set()
    for index, span in enumerate(spans):
        mark = chr(FIRST_MARK + index)
        text += source[end : span.start] + mark
        end = span.end
        if span.slot:
            slots.add(mark)
    literals = tuple(source[s.start : s.end] for s in spans)
    return Field(text + source[end:], literals, frozenset(slots), editable < len(source))
