"""What fuzzing does to good files: flipped bits, cut ends, wrong shapes, huge headers, deep nesting, odd Unicode. All
of it follows from a ``random.Random``.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Any

ODD_TEXTS = (
    "", " ", "\u200b", "\ufeff", "\u202eevil", "\u0000", "\u2028", "e\u0301", "İ", "👩\u200d👩\u200d👧", "\ud800",
    "\udfff\ud800", "\x1b[31m", "</script><script>hack()</script>", "<img src=x onerror=hack()>", "{{text}}",
    "{{ 7 * 7 }}", "\\{{text}}", "<|im_end|>", "../../etc/passwd", "CON", "a" * 5000, "=1+1", "%s%n", "'; drop table",
    "\r\n", "\u0085", "\U000e0041", "NaN", "true",
)  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**40, -(10**40), 1e308, 1e-320, 0.1, [], {}, [[]], {"": None},
)  # fmt: skip
DEPTHS = (50, 900, 5000, 100_000)


def odd(chance: Random) -> Any:
    """Some value that is not what was there."""
    return chance.choice(ODD_TEXTS) if chance.random() < 0.5 else chance.choice(ODD_VALUES)


def deep(chance: Random) -> str:
    """JSON that is nested deeply, closed or not."""
    depth, (opening, closing) = chance.choice(DEPTHS), chance.choice((("[", "]"), ('{"a":', "}")))
    return opening * depth + "1" + closing * (depth if chance.random() < 0.7 else 0)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to everything in a JSON value."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*path, key))
    return found


def change_value(chance: Random, value: Any) -> Any:
    """A JSON value in which one entry is another, is missing, is there twice under other names, or is moved."""
    value = json.loads(json.dumps(value))
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        paths = places(value)
        if not paths:
            return odd(chance)
        *above, last = chance.choice(paths)
        holder = value
        for key in above:
            holder = holder[key]
        action = chance.random()
        if action < 0.55:
            holder[last] = odd(chance)
        elif action < 0.75:
            del holder[last]
        elif action < 0.9 and isinstance(holder, dict):
            holder[chance.choice(ODD_TEXTS)] = holder[last]
        else:
            holder[last] = [holder[last]] if chance.random() < 0.5 else {"x": holder[last]}
    return value


def change_json(chance: Random, data: bytes) -> bytes:
    """The bytes of a JSON document, damaged as a value or as text."""
    value: Any = None
    with suppress(ValueError, RecursionError):  # damaged already
        value = json.loads(data)
    if value is not None and chance.random() < 0.75:
        changed = change_value(chance, value)
        text = json.dumps(changed, ensure_ascii=chance.random() < 0.7, indent=chance.choice((None, 2)))
        return text.encode("utf-8", "surrogatepass")
    if chance.random() < 0.3:
        return deep(chance).encode()
    return change_bytes(chance, data)


def change_lines(chance: Random, data: bytes) -> bytes:
    """The bytes of a file of JSON lines, one line damaged, doubled, missing or moved."""
    lines = data.splitlines() or [b""]
    at, action = chance.randrange(len(lines)), chance.random()
    if action < 0.6:
        lines[at] = change_json(chance, lines[at]).replace(b"\n", b" ") if lines[at] else b"{}"
    elif action < 0.7:
        lines.insert(at, lines[at])
    elif action < 0.8:
        del lines[at]
    elif action < 0.9:
        lines.insert(at, chance.choice((b"", b"null", b"[]", b"{", b"\xef\xbb\xbf{}", deep(chance).encode())))
    else:
        return change_bytes(chance, data)
    ends = chance.choice((b"\n", b"\n", b"\n", b"\r\n", b"\r"))
    return ends.join(lines) + chance.choice((ends, b""))


def change_bytes(chance: Random, data: bytes) -> bytes:
    """Bytes with flipped bits, a cut end, a doubled or missing stretch, or something inserted."""
    changed, action = bytearray(data), chance.random()
    at = chance.randrange(len(changed) + 1)
    if action < 0.4 and changed:
        for _ in range(chance.choice((1, 1, 2, 8))):
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    elif action < 0.6:
        del changed[at:]
    elif action < 0.75:
        length = chance.choice((1, 10, 100))
        changed[at:at] = changed[at : at + length]
    elif action < 0.85:
        del changed[at : at + chance.choice((1, 4, 50))]
    else:
        text = chance.choice(ODD_TEXTS).encode("utf-8", "surrogatepass")
        changed[at:at] = chance.choice(
            (text, bytes(chance.randrange(256) for _ in range(8)), b"\xff\xfe", b"\x00" * 64)
        )
    return bytes(changed)


def change_tensors(chance: Random, data: bytes) -> bytes:
    """The bytes of a safetensors file: its header's length, its header, or anything in it damaged."""
    action = chance.random()
    if action < 0.2:
        length = chance.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1, len(data)))
        return struct.pack("<Q", length) + data[8:]
    if action < 0.65:
        (length,) = struct.unpack("<Q", data[:8])
        header = change_value(chance, json.loads(data[8 : 8 + length])) if chance.random() < 0.85 else None
        text = (deep(chance) if header is None else json.dumps(header)).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]
    return change_bytes(chance, data)


Change = Callable[[Random, bytes], bytes]


def change_for(name: str) -> Change:
    """How a file of this name is damaged."""
    if name.endswith(".jsonl"):
        return change_lines
    if name.endswith(".json"):
        return change_json
    return change_tensors if name.endswith(".safetensors") else change_bytes
