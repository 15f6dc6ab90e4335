"""Placeholders: the token ids by which a prompt asks a server for a context, one for each of its slots.

They are drawn from the hash of the context's content, so a server's prefix cache, which keys blocks by token ids, never
mixes contexts up with each other or with text. Where the tokenizer allows it they are words, behind which a special
token stands as a fence: then they have a text that is tokenized into exactly these ids whatever follows, and a chat
template can write them.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

MARKER = 4
SHORTEST = 8
"""Slots from which on placeholders begin with a marker, and end with a fence: fewer have no room for them."""
LEAST_WORDS = 1024
"""Words that a tokenizer needs: three draws of so many tell contexts apart."""
WORD = re.compile(r"[Ġ▁][A-Za-z]{2,}")


@dataclass(frozen=True)
class Placeholders:
    """Ids with what is known of them.

    Attributes:
        ids: one for each slot.
        marker: how many of them, at the start, are the same for every context of the tokenizer.
        text: what is tokenized into ``ids``, whatever follows it; None where there is no such text.
    """

    ids: list[int]
    marker: int
    text: str | None


def placeholders(digest: str, count: int, tokenizer: Any) -> Placeholders:
    """``count`` placeholders for a context whose content has this hash; equal contexts get equal ones."""
    special = set(tokenizer.all_special_ids)
    marker = MARKER if count >= SHORTEST else 0
    if marker:
        names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        words = [i for i, name in enumerate(names) if i not in special and name and WORD.fullmatch(name)]
        if len(words) >= LEAST_WORDS:
            drawn = _drawn(digest, count - 1, marker, words, lambda token: _alone(tokenizer, token))
            for fence in sorted(special):
                ids = [*drawn, fence]
                if (text := _text(tokenizer, ids)) is not None:
                    return Placeholders(ids, marker, text)
    ordinary = [token for token in range(len(tokenizer)) if token not in special]
    return Placeholders(_drawn(digest, count, marker, ordinary, lambda token: True), marker, None)


def _drawn(digest: str, count: int, marker: int, pool: list[int], allowed: Any) -> list[int]:
    """The marker's ids, and further ones to ``count`` that the digest chooses, all of the pool and allowed."""
    seeds = [f"kvopt:{i}" for i in range(marker)] + [f"{digest}:{i}" for i in range(marker, count)]
    ids = []
    for seed in seeds:
        draw = hashlib.sha256(seed.encode()).digest()
        while not allowed(token := pool[int.from_bytes(draw[:8], "big") % len(pool)]):
            draw = hashlib.sha256(draw).digest()
        ids.append(token)
    return ids


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _alone(tokenizer: Any, token: int) -> bool:
    """Whether a word is tokenized as itself behind another one."""
    name = tokenizer.convert_ids_to_tokens(token)
    return _ids(tokenizer, " the " + name[1:])[-1:] == [token]


def _text(tokenizer: Any, ids: list[int]) -> str | None:
    """Text that is tokenized into ``ids``, alone and with text of several kinds behind it; None where none is."""
    *words, fence = tokenizer.convert_ids_to_tokens(ids)
    joined = "".join(" " + word[1:] for word in words)
    for text in (joined + fence, joined.removeprefix(" ") + fence):
        if all(_ids(tokenizer, text + more)[: len(ids)] == ids for more in ("", "s", " word", "\n", "1", "ing.")):
            return text
    return None
