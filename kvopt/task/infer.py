"""Recovering the template C and its slots from prompts that are already rendered.

What every row has, in the same order and as often, is template; what lies between is a slot. Rows are compared word by
word. The text that all rows begin and end with comes first, then the longest common segment between, then the same on
either side of it. A short segment counts only if it can hardly be an accident: the fewer the rows, the more it must
say. The result is always checked: it renders every row back exactly, or nothing is returned.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvopt.errors import InputError, counted
from kvopt.task.slot_edges import doubts, slot_names
from kvopt.task.template import Part, Slot, Static, Template, unparse

MIN_ROWS = 3
SAMPLE = 48  # rows that segments are looked for in; the others only confirm or join
MAJORITY = 0.8  # share of rows that makes the rest look like strangers
SHOWN = 60  # characters of a row in a message

# a word, one CJK or Thai character, a line break, or any single other character
UNSPACED = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\u0e00-\u0e7f"
TOKEN = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|\r\n|.", re.DOTALL)
COMMON_WORDS = frozenset(
    {"the", "and", "for", "are", "was", "you", "not", "but", "with", "that", "this", "from", "have"}
)

Prompt = str | Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Inferred:
    """A template and the values that render every row with it.

    Attributes:
        template: C with slots named after the text before them, else ``input`` or ``input_1`` …
        values: slot values, one mapping a row.
        outputs: gold outputs where the file had them, else None.
        coverage: share of the rows' characters that is template text.
        notes: what a person should look at.
    """

    template: Template
    values: tuple[dict[str, str], ...]
    coverage: float
    outputs: tuple[str, ...] | None = None
    notes: tuple[str, ...] = field(default=())

    def rows(self) -> list[dict[str, str]]:
        """Rows of a data file for this template: the slot values and, where known, ``output``."""
        if self.outputs is None:
            return [dict(values) for values in self.values]
        return [{**values, "output": output} for values, output in zip(self.values, self.outputs, strict=True)]


def infer_template(prompts: Sequence[Prompt], names: Sequence[str] | None = None) -> Inferred:
    """Find the template of at least three rendered prompts, all text or all chat messages.

    Args:
        prompts: strings, or lists of ``{"role", "content"}``.
        names: what to call each row in messages (``"prompts.jsonl:3"``); by default ``row 3``.

    Raises:
        InputError: too few rows, all the same, no common text, roles that differ, or a few rows that do not fit what
            the others share; it names the rows and the text that did not fit.
    """
    names = names or [f"row {i}" for i in range(1, len(prompts) + 1)]
    if len(prompts) < MIN_ROWS:
        raise InputError(
            f"{counted(len(prompts), 'prompt')}: too few to tell the template from the inputs", fix="give three or more"
        )
    roles = _roles(prompts, names)
    texts = [[p] if isinstance(p, str) else [m["content"] for m in p] for p in prompts]
    columns = [_infer_text(list(column), names) for column in zip(*texts, strict=True)]
    if not any(slots for _, slots, _ in columns):
        raise InputError("all prompts are the same, so nothing is a slot", where=names[0])
    weight = sum(_weight(literal) for literals, _, _ in columns for literal in literals)
    if weight < _needed(len(prompts)):
        raise InputError(
            f"no text is common to all prompts: {_residue(texts[0][-1])} and {_residue(texts[1][-1])}",
            where=f"{names[0]}, {names[1]}",
            fix="give prompts that were rendered from one template",
        )
    inferred = _assemble(columns, roles, len(prompts))
    _verify(inferred, prompts, names)
    return inferred


def _roles(prompts: Sequence[Prompt], names: Sequence[str]) -> tuple[str, ...] | None:
    """The roles of chat prompts, None for text. Raises InputError for rows that differ from most."""
    kinds: list[tuple[str, ...] | None] = []
    for prompt, name in zip(prompts, names, strict=True):
        if isinstance(prompt, str):
            kinds.append(None)
            continue
        if not prompt or not all(isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt):
            raise InputError("a message needs a role and a content, both text", where=name)
        kinds.append(tuple(str(m["role"]) for m in prompt))
    usual = Counter(kinds).most_common(1)[0][0]
    strangers = [i for i, kind in enumerate(kinds) if kind != usual]
    if strangers:
        first = kinds[strangers[0]]
        raise InputError(
            f"{_described(first)} where the others are {_described(usual)}",
            where=_named(strangers, names),
            fix="use only rows of one form",
        )
    return usual


def _described(roles: tuple[str, ...] | None) -> str:
    return "text" if roles is None else f"messages from {', '.join(roles)}"


def _named(rows: Sequence[int], names: Sequence[str]) -> str:
    more = f" and {len(rows) - 4} more" if len(rows) > 4 else ""
    return ", ".join(names[i] for i in rows[:4]) + more


def _residue(text: str) -> str:
    return repr(text if len(text) <= SHOWN else text[: SHOWN - 1] + "…")


# One text: literals l0 … lk and values v1 … vk of each row, with l0 v1 l1 … vk lk being the row

Split = tuple[list[str], list[list[str]], list[str]]


def _infer_text(texts: list[str], names: Sequence[str]) -> Split:
    """Literals, values (slot by slot, each a list over rows) and notes. Raises InputError for rows that do not fit."""
    literals, slots = _split(texts)
    notes = doubts(literals, len(texts)) if slots else []
    for number, values in enumerate(slots, 1):
        segment, strangers = _majority_segment(values)
        if not strangers:
            continue
        fitting = [text for i, text in enumerate(texts) if i not in set(strangers)]
        others = _split(fitting)[0] if len(fitting) >= MIN_ROWS else literals
        if sum(map(_weight, literals)) < 0.5 * sum(map(_weight, others)):
            raise InputError(
                f"does not fit the template of the other {len(fitting)} prompts, which share {_residue(segment)}: "
                f"left over is {_residue(values[strangers[0]])}",
                where=_named(strangers, names),
                fix="remove these rows, or recover their template separately",
            )
        notes.append(
            f"most rows have {_residue(segment)} once in slot {number}, but not {_named(strangers, names)}; "
            "it stays part of the input"
        )
    return literals, slots, notes


def _split(texts: list[str]) -> tuple[list[str], list[list[str]]]:
    """Literals and slots of texts. Segments come from a sample of rows, which grows by rows that they do not fit."""
    alphabet = _Alphabet()
    rows = [alphabet.encode(text) for text in texts]
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), rows[i]))
    step = max(1, math.ceil(len(order) / SAMPLE))
    sample = set(order[::step])
    while True:
        prefix, suffix = _ends(rows)
        middles = [row[len(prefix) : len(row) - len(suffix)] for row in rows]
        tree = _Node.find([middles[i] for i in sorted(sample)], alphabet, len(rows))
        pieces = [tree.pieces(middle) if tree else [middle] for middle in middles]
        wrong = [i for i, piece in enumerate(pieces) if piece is None]
        if not wrong:
            break
        sample.update(wrong[: max(8, len(sample))])
    literals = [prefix, *(tree.literals() if tree else []), suffix]
    columns = [list(column) for column in zip(*[piece for piece in pieces if piece is not None], strict=True)]
    for i, column in enumerate(columns):  # what all values begin or end with is template
        start, end = _ends(column)
        literals[i], literals[i + 1] = literals[i] + start, end + literals[i + 1]
        columns[i] = [value[len(start) : len(value) - len(end)] for value in column]
    return _without_empty([alphabet.decode(s) for s in literals], [[alphabet.decode(v) for v in c] for c in columns])


def _without_empty(literals: list[str], columns: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Leave out slots that are the same in every row: their text is template."""
    kept, slots = [literals[0]], []
    for values, literal in zip(columns, literals[1:], strict=True):
        if len(set(values)) == 1:
            kept[-1] += values[0] + literal
        else:
            slots.append(values)
            kept.append(literal)
    return kept, slots


def _ends(rows: list[str]) -> tuple[str, str]:
    """The prefix and the suffix common to all rows, not overlapping in the shortest."""
    low, high = min(rows), max(rows)
    prefix = _common(low, high)
    room = min(map(len, rows)) - prefix
    backwards = [row[::-1] for row in rows]
    suffix = min(room, _common(min(backwards), max(backwards)))
    return low[:prefix], low[len(low) - suffix :]


def _common(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class _Alphabet:
    """Words as single characters, so that segments are substrings."""

    def __init__(self) -> None:
        self._codes: dict[str, str] = {}
        self._words: dict[str, str] = {}

    def encode(self, text: str) -> str:
        return "".join(self._code(word) for word in TOKEN.findall(text))

    def _code(self, word: str) -> str:
        if word not in self._codes:
            number = len(self._codes) + 1
            code = chr(number if number < 0xD800 else number + 0x800)  # past the surrogates
            self._codes[word], self._words[code] = code, word
        return self._codes[word]

    def decode(self, codes: str) -> str:
        return "".join(self._words[code] for code in codes)


@dataclass(frozen=True)
class _Node:
    """A literal segment that all rows have equally often, and what divides the text before, between and after it."""

    segment: str
    children: tuple[_Node | None, ...]

    @classmethod
    def find(cls, gaps: list[str], alphabet: _Alphabet, rows: int) -> _Node | None:
        """The longest segment in ``gaps`` that says enough, and so on inside the pieces it leaves."""
        segment = _best_segment(gaps, alphabet, _needed(rows))
        if segment is None:
            return None
        pieces = zip(*[gap.split(segment) for gap in gaps], strict=True)
        return cls(segment, tuple(cls.find(list(piece), alphabet, rows) for piece in pieces))

    def literals(self) -> list[str]:
        result: list[str] = []
        for i, child in enumerate(self.children):
            result += [self.segment] if i else []
            result += child.literals() if child else []
        return result

    def pieces(self, gap: str) -> list[str] | None:
        """What a row has in the slots; None if it does not have the segments as often."""
        gaps = gap.split(self.segment)
        if len(gaps) != len(self.children):
            return None
        result: list[str] = []
        for inner_gap, child in zip(gaps, self.children, strict=True):
            inner = child.pieces(inner_gap) if child else [inner_gap]
            if inner is None:
                return None
            result += inner
        return result


def _best_segment(gaps: list[str], alphabet: _Alphabet, needed: float) -> str | None:
    """The longest segment that every gap holds equally often and that weighs enough; of equals the heaviest, first."""
    shortest = min(gaps, key=lambda gap: (len(gap), gap))
    others = [gap for gap in gaps if gap is not shortest]
    for length in range(_longest_shared(shortest, others), 0, -1):
        fitting = []
        for segment in _shared(shortest, others, length):
            times = shortest.count(segment)
            weight = _weight(alphabet.decode(segment))
            if weight >= needed and all(gap.count(segment) == times for gap in others):
                fitting.append((-weight, shortest.index(segment), segment))
        if fitting:
            return min(fitting)[2]
    return None


def _shared(shortest: str, others: Iterable[str], length: int) -> list[str]:
    """The segments of a length that every text holds, in order of appearance."""
    segments = list(dict.fromkeys(shortest[i : i + length] for i in range(len(shortest) - length + 1)))
    for other in others:
        segments = [segment for segment in segments if segment in other]
    return segments


def _longest_shared(shortest: str, others: list[str]) -> int:
    """The length of the longest common segment, by bisection: every part of a common segment is common."""
    low, high = 0, len(shortest)
    while low < high:
        middle = (low + high + 1) // 2
        if _shared(shortest, others, middle):
            low = middle
        else:
            high = middle - 1
    return low


def _majority_segment(values: list[str]) -> tuple[str, list[int]]:
    """The longest segment that most values hold, and the rows that do not hold it exactly once (none: no such text)."""
    if len(values) < MIN_ROWS + 1:
        return "", []
    alphabet = _Alphabet()
    rows = [alphabet.encode(value) for value in values]
    quorum = math.ceil(MAJORITY * len(rows))
    sample = sorted(rows, key=lambda row: (len(row), row))
    # more than a fifth of the rows cannot all be strangers, so one of these holds what most rows hold
    seeds = sample[:: max(1, len(sample) // 4)][:5]
    best: tuple[float, str] = (_needed(len(rows)), "")
    for row in seeds:
        segment = _longest_with_quorum(row, rows, quorum)
        weight = _weight(alphabet.decode(segment))
        if weight > best[0]:
            best = weight, segment
    if not best[1]:
        return "", []
    return alphabet.decode(best[1]), [i for i, row in enumerate(rows) if row.count(best[1]) != 1]


def _longest_with_quorum(row: str, rows: list[str], quorum: int) -> str:
    low, high, longest = 0, len(row), ""
    while low < high:
        length = (low + high + 1) // 2
        segments = dict.fromkeys(row[i : i + length] for i in range(len(row) - length + 1))
        hit = next((s for s in segments if _held_by(s, rows, quorum)), None)
        if hit is None:
            high = length - 1
        else:
            low, longest = length, hit
    return longest


def _held_by(segment: str, rows: list[str], quorum: int) -> bool:
    missing = 0
    for row in rows:
        missing += segment not in row
        if missing > len(rows) - quorum:
            return False
    return True


def _weight(text: str) -> float:
    """How much a segment says: line breaks and long words most, spaces nothing."""
    total = 0.0
    for word in TOKEN.findall(text):
        if word[0] in "\r\n":
            total += 3 if not total else 1.5
        elif word.isspace():
            total += 2 if word == "\t" else 0
        elif word[0].isalnum():
            total += 1 if len(word) < 3 or word.lower() in COMMON_WORDS else 2 if len(word) == 3 else 3
        else:
            total += 1
    return total


def _needed(rows: int) -> float:
    """The weight below which a segment may be an accident in so many rows."""
    return 4 if rows < 5 else 3.5 if rows < 8 else 3 if rows < 16 else 2 if rows < 32 else 1


# Putting the texts together


def _assemble(columns: list[Split], roles: tuple[str, ...] | None, count: int) -> Inferred:
    """Name the slots in reading order, the same name for slots that are equal in every row."""
    everything = [tuple(values) for _, slots, _ in columns for values in slots]
    before = [literal for literals, _, _ in columns for literal in literals[:-1]]
    keys = [v if len(set(v)) >= MIN_ROWS else (i, v) for i, v in enumerate(everything)]
    name = slot_names(keys, before)
    named = iter([name[key] for key in keys])
    fields, static = [], 0
    for literals, slots, _ in columns:
        parts: list[Part] = [Static(literals[0])]
        for _, literal in zip(slots, literals[1:], strict=True):
            parts += [Slot(next(named)), Static(literal)]
        static += sum(map(len, literals))
        fields.append(unparse(parts))
    by_name = {name[key]: values for key, values in zip(keys, everything, strict=True)}
    rows = tuple({slot: values[i] for slot, values in by_name.items()} for i in range(count))
    total = static * count + sum(len(value) for values in everything for value in values)
    if roles is None:
        template = Template.from_text(fields[0])
    else:
        messages = [{"role": role, "content": text} for role, text in zip(roles, fields, strict=True)]
        template = Template.from_messages(messages, where="the prompts")
    notes = tuple(note for _, _, notes in columns for note in notes)
    return Inferred(template, rows, static * count / total, notes=notes)


def _verify(inferred: Inferred, prompts: Sequence[Prompt], names: Sequence[str]) -> None:
    for prompt, values, name in zip(prompts, inferred.values, names, strict=True):
        wanted = prompt if isinstance(prompt, str) else [{"role": m["role"], "content": m["content"]} for m in prompt]
        if inferred.template.fill(values) != wanted:
            raise InputError("the recovered template does not give this prompt back", where=name)
