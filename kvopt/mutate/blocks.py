"""A light, lossless view of masked text: blocks (paragraphs, lists, headings, blank lines) and sentences. Joining the
parts gives the text back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TypeVar

from kvopt.mutate.spans import MARK
from kvopt.mutate.vocabulary import HEADINGS

T = TypeVar("T")

LINE = re.compile(r"[^\r\n]*(?:\r\n|\n|\r)|[^\r\n]+")
ITEM = re.compile(r"([ \t]*)([-*•+–◦]|\(?(?:\d{1,3}|[a-z])[.)])([ \t]+)(?=\S)")
MARKDOWN_HEADING = re.compile(r"(?P<open>#{1,6}[ \t]+)(?P<name>[^\r\n]*?)(?P<close>[ \t]*:?[ \t]*)$")
BOLD_HEADING = re.compile(r"(?P<open>\*\*|__)(?P<name>[^*_\r\n]+?)(?P<close>:?(?:\*\*|__):?)[ \t]*$")
LABEL_HEADING = re.compile(r"(?P<open>)(?P<name>[A-Za-z][A-Za-z ]{0,40}?)(?P<close>[ \t]*:?[ \t]*)$")
RULE = re.compile(r"[ \t]*([-*_=])(?:[ \t]*\1){2,}[ \t]*$")
SENTENCE_END = re.compile(rf"(?<=[.!?])([\"”'’)\]*]*)([ \t]+|(?:\r\n|\n))(?=[\"“‘(\[*]*[A-Z{MARK[1:-1]}])")
ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|etc|vs|cf|Mr|Mrs|Ms|Dr|Prof|No|Fig|approx|incl)|\b[A-Z])\.$")


@dataclass(frozen=True)
class Block:
    """``kind`` is paragraph, list, heading, rule (a separator line) or blank; ``text`` keeps its line endings."""

    kind: str
    text: str

    @property
    def body(self) -> str:
        """The text without its last line ending."""
        return self.text.rstrip("\r\n")

    @property
    def end(self) -> str:
        return self.text[len(self.body) :]

    def with_body(self, body: str) -> Block:
        return Block(self.kind, body + self.end)


@dataclass(frozen=True)
class ListItem:
    """One list item: ``indent marker gap body`` and what separates it from the next."""

    indent: str
    marker: str
    gap: str
    body: str
    end: str

    @property
    def text(self) -> str:
        return self.indent + self.marker + self.gap + self.body + self.end

    @property
    def numbered(self) -> bool:
        return self.marker.strip("().").isalnum()


@dataclass(frozen=True)
class Heading:
    """A heading line split into decoration and name."""

    open: str
    name: str
    close: str


def join(blocks: Sequence[Block]) -> str:
    return "".join(block.text for block in blocks)


def heading_of(line: str) -> Heading | None:
    """The heading that a whole line is, or None. Plain lines count only when they are a known section name with a colon
    or in capitals.
    """
    for pattern in (MARKDOWN_HEADING, BOLD_HEADING):
        if (match := pattern.match(line)) and match["name"].strip():
            return Heading(match["open"], match["name"], match["close"])
    match = LABEL_HEADING.match(line)
    if match and match["name"].lower() in HEADINGS.names and (":" in match["close"] or match["name"].isupper()):
        return Heading("", match["name"], match["close"])
    return None


def _marker_style(marker: str) -> str:
    if not marker.strip("().").isalnum():
        return marker
    return re.sub(r"\d+", "1", re.sub(r"[a-z]", "a", marker))


def blocks(text: str) -> list[Block]:
    """Split text into blocks; ``join(blocks(text)) == text``."""
    lines = LINE.findall(text)
    text_blocks: list[Block] = []
    index = 0
    while index < len(lines):
        line = lines[index].rstrip("\r\n")
        item = ITEM.match(line)
        if not line.strip():
            text_blocks.append(Block("blank", lines[index]))
        elif RULE.match(line):
            text_blocks.append(Block("rule", lines[index]))
        elif item:
            stop = _list_end(lines, index, item)
            text_blocks.append(Block("list", "".join(lines[index:stop])))
            index = stop
            continue
        elif heading_of(line):
            text_blocks.append(Block("heading", lines[index]))
        elif text_blocks and text_blocks[-1].kind == "paragraph":
            text_blocks[-1] = Block("paragraph", text_blocks[-1].text + lines[index])
        else:
            text_blocks.append(Block("paragraph", lines[index]))
        index += 1
    return text_blocks


def _list_end(lines: Sequence[str], start: int, first: re.Match[str]) -> int:
    """Index after the last line of the list that begins at ``start``; blank lines between items belong to it."""
    indent, style, end, index = len(first[1]), _marker_style(first[2]), start + 1, start + 1
    while index < len(lines):
        line = lines[index].rstrip("\r\n")
        item = ITEM.match(line)
        if not line.strip():
            index += 1
            continue
        same = item and len(item[1]) == indent and _marker_style(item[2]) == style
        deeper = len(line) - len(line.lstrip(" \t")) > indent and index == end
        if not (same or deeper):
            break
        index += 1
        end = index
    return end


def items(block: Block) -> list[ListItem]:
    """The top-level items of a list block; continuation and nested lines stay in the item's body."""
    lines = LINE.findall(block.text)
    first = ITEM.match(lines[0])
    assert first is not None
    starts = []
    for i, line in enumerate(lines):
        match = ITEM.match(line)
        if match and len(match[1]) == len(first[1]) and _marker_style(match[2]) == _marker_style(first[2]):
            starts.append(i)
    list_items = []
    for start, stop in zip(starts, [*starts[1:], len(lines)], strict=True):
        whole = "".join(lines[start:stop])
        match = ITEM.match(whole)
        assert match is not None
        body = whole[match.end() :]
        stripped = body.rstrip()
        list_items.append(ListItem(match[1], match[2], match[3], stripped, body[len(stripped) :]))
    return list_items


def list_block(list_items: Sequence[ListItem]) -> Block:
    return Block("list", "".join(item.text for item in list_items))


def number_marker(style: str, position: int) -> str:
    """Marker number ``position`` (from 0) in a style such as ``1.``, ``1)``, ``(1)`` or ``a.``."""
    return style.replace("1", str(position + 1)) if "1" in style else style.replace("a", chr(ord("a") + position))


def renumber(list_items: Sequence[ListItem], style: str) -> list[ListItem]:
    return [replace(item, marker=number_marker(style, i)) for i, item in enumerate(list_items)]


def sentences(text: str) -> list[tuple[str, str]]:
    """``(sentence, space after it)`` pairs of a paragraph; joining both gives the text back."""
    pairs, start = [], 0
    for match in SENTENCE_END.finditer(text):
        end = match.end(1)
        if ABBREVIATION.search(text[start:end]):
            continue
        pairs.append((text[start:end], match[2]))
        start = match.end()
    if start < len(text):
        pairs.append((text[start:], ""))
    return pairs


def units(text: str) -> Iterator[tuple[int, int]]:
    """Spans of the sentences and list items of ``text``, in order: what lexical operators and paraphrasers work on."""
    position = 0
    for block in blocks(text):
        if block.kind == "paragraph":
            start = position
            for sentence, space in sentences(block.body):
                yield start, start + len(sentence)
                start += len(sentence) + len(space)
        elif block.kind == "list":
            start = position
            for item in items(block):
                offset = start + len(item.indent + item.marker + item.gap)
                for sentence, space in sentences(item.body):
                    yield offset, offset + len(sentence)
                    offset += len(sentence) + len(space)
                start += len(item.text)
        position += len(block.text)


def replace_spans(text: str, changes: Sequence[tuple[int, int, str]]) -> str:
    """``text`` with each non-overlapping ``(start, end, new)`` put in."""
    for start, end, new in sorted(changes, reverse=True):
        text = text[:start] + new + text[end:]
    return text


def capitalize(text: str) -> str:
    return text[:1].upper() + text[1:]


def lower_first(text: str) -> str:
    """Lower the first letter unless the first word is "I" or in capitals."""
    word = re.match(r"[A-Za-z]+", text)
    if not word or word[0] == "I" or (len(word[0]) > 1 and word[0].isupper()):
        return text
    return text[:1].lower() + text[1:]


def some(rng: Random, choices: Sequence[T]) -> list[T]:
    """A random non-empty part of ``choices``: one, about half or all, each as likely; order kept."""
    if not choices:
        return []
    size = rng.choice([1, max(1, (len(choices) + 1) // 2), len(choices)])
    return [choices[i] for i in sorted(rng.sample(range(len(choices)), size))]
