"""Rows in the layouts that public instruction data comes in, as the rest of kvopt reads rows.

ShareGPT: ``{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}]}``, read as chat
``messages``. Alpaca: ``{"instruction": "…", "input": "…", "output": "…"}``, whose input may be empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CONVERSATIONS = "conversations"
MESSAGES = "messages"
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
"""The role of a ShareGPT speaker; others (system, user, assistant, tool) are their own."""
INSTRUCTION, INPUT = "instruction", "input"


class BadTurn(Exception):
    """A turn of a conversation that is none; the text says which, and why."""


def with_messages(fields: dict[str, Any]) -> dict[str, Any]:
    """A row with the ``messages`` of its conversation beside it; a row of any other layout as it is. Raises BadTurn."""
    turns = fields.get(CONVERSATIONS)
    if MESSAGES in fields or not isinstance(turns, list) or not any(_is_sharegpt(turn) for turn in turns):
        return fields
    return fields | {MESSAGES: [_message(number, turn) for number, turn in enumerate(turns, 1)]}


def _is_sharegpt(turn: Any) -> bool:
    return isinstance(turn, Mapping) and ("from" in turn or "value" in turn)


def _message(number: int, turn: Any) -> dict[str, Any]:
    for key in ("from", "value"):
        if not isinstance(turn, Mapping) or not isinstance(turn.get(key), str):
            raise BadTurn(f"turn {number} of the conversation has no text in {key!r}")
    return {"role": ROLES.get(turn["from"], turn["from"]), "content": turn["value"]}


def is_alpaca(fields: Mapping[str, Any]) -> bool:
    """Whether a row has an instruction and an input."""
    return INSTRUCTION in fields and INPUT in fields


def request(fields: Mapping[str, Any]) -> Any:
    """What an Alpaca row asks as one text: the instruction, and after an empty line the input, where it has one."""
    instruction, given = fields[INSTRUCTION], fields[INPUT]
    both = isinstance(instruction, str) and isinstance(given, str) and given.strip()
    return f"{instruction}\n\n{given}" if both else instruction
