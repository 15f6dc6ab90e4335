"""Tokenizing text in which some stretches are data: control tokens written there (``<|im_end|>``, ``</s>``,
``<tool_call>``) stay text.

Production code tokenizes the whole prompt, and so does this module as long as no data stretch holds the spelling of a
control token. When one does, the text is cut at the genuine control tokens, and the stretches between them go through
a copy of the tokenizer that knows no control tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from kvopt.errors import InputError

Span = tuple[int, int]


@dataclass
class PlainTokens:
    """Encodes text with data stretches for one (fast) tokenizer."""

    tokenizer: Any
    _copies: dict[bool, Tokenizer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not getattr(self.tokenizer, "is_fast", False):
            raise InputError(
                f"{type(self.tokenizer).__name__} gives no character offsets",
                where="model.base",
                fix="use a base with a fast tokenizer",
            )
        self.control = control_tokens(self.tokenizer)
        names = sorted(filter(None, self.tokenizer.convert_ids_to_tokens(sorted(self.control))), key=len, reverse=True)
        self._spelling = re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def spells_control(self, text: str) -> bool:
        """Whether a control token is written in ``text``."""
        return self._spelling.search(text) is not None

    def encode(self, text: str, data: Sequence[Span], *, add_special_tokens: bool) -> tuple[list[int], list[Span]]:
        """Token ids of ``text`` and each token's (start, end) characters; no token of ``control`` overlaps a span of
        ``data``.
        """
        encoding = self.tokenizer(
            text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False
        )
        ids: list[int] = list(encoding["input_ids"])
        offsets: list[Span] = [tuple(pair) for pair in encoding["offset_mapping"]]
        if any(i in self.control and _overlaps(span, data) for i, span in zip(ids, offsets, strict=True)):
            return self._encode_cut(text, ids, offsets, data)
        return ids, offsets

    def _encode_cut(
        self, text: str, ids: list[int], offsets: list[Span], data: Sequence[Span]
    ) -> tuple[list[int], list[Span]]:
        result: list[int] = []
        spans: list[Span] = []
        start = 0
        genuine = [(i, s) for i, s in zip(ids, offsets, strict=True) if i in self.control and not _overlaps(s, data)]
        for token, (begin, end) in [*genuine, (None, (len(text), len(text)))]:
            if begin > start:
                piece = self._copy(first=start == 0).encode(text[start:begin], add_special_tokens=False)
                result += piece.ids
                spans += [(a + start, b + start) for a, b in piece.offsets]
            if token is not None:
                result.append(token)
                spans.append((begin, end))
            start = max(start, end)
        return result, spans

    def _copy(self, *, first: bool) -> Tokenizer:
        """The tokenizer without control tokens; ``first`` says whether the stretch begins the text (some tokenizers
        mark that).
        """
        if first not in self._copies:
            state = json.loads(self.tokenizer.backend_tokenizer.to_str())
            names = {name for name, i in self.tokenizer.get_vocab().items() if i in self.control}
            state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] not in self.control]
            state["post_processor"] = state["truncation"] = state["padding"] = None
            _forget(state["model"], names)
            if not first:
                _no_mark_at_start(state)
            self._copies[first] = Tokenizer.from_str(json.dumps(state))
        return self._copies[first]


def _overlaps(span: Span, data: Sequence[Span]) -> bool:
    return any(span[0] < end and start < span[1] for start, end in data)


def control_tokens(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that open or close something in a conversation: special tokens, added tokens of the form
    ``<|…|>``, and added markup (``<…>``, ``[…]``) that the chat template writes.

    Without a chat template any added markup may do that. Other added tokens (HTML tags, white space, words) are text.
    """
    control = set(tokenizer.all_special_ids)
    template = getattr(tokenizer, "chat_template", None)
    written = str(template) if template else None
    for i, token in tokenizer.added_tokens_decoder.items():
        text = token.content.strip()
        markup = len(text) > 2 and text[0] in "<[" and text[-1] in ">]"
        if token.special or text.startswith("<|") or (markup and (written is None or text in written)):
            control.add(i)
    return frozenset(control)


def _forget(model: dict[str, Any], names: set[str]) -> None:
    """Rename the control tokens inside the model's own vocabulary, so that no text can reach them (ids and scores
    stay).
    """
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        needed = {part for merge in model.get("merges", ()) for part in _merge_parts(merge)}
        for name in names & vocab.keys() - needed:
            if name != model.get("unk_token"):
                vocab[f"\x00unreachable {name}"] = vocab.pop(name)
    elif isinstance(vocab, list):
        unknown = model.get("unk_id")
        for index, (piece, score) in enumerate(vocab):
            if piece in names and index != unknown:
                vocab[index] = [f"\x00unreachable {piece}", score]


def _merge_parts(merge: Any) -> tuple[str, str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right, left + right


def _no_mark_at_start(node: Any) -> None:
    """Metaspace with ``prepend_scheme: first`` marks the start of the text alone; a later stretch gets no mark."""
    if isinstance(node, dict):
        if node.get("type") == "Metaspace" and node.get("prepend_scheme") == "first":
            node["prepend_scheme"] = "never"
        for child in node.values():
            if isinstance(child, dict | list):
                _no_mark_at_start(child)
    elif isinstance(node, list) and node and isinstance(node[0], dict):
        for child in node:
            _no_mark_at_start(child)
