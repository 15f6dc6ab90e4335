"""From a row's columns to an example's slot values and output, by column name, by path, or out of chat ``messages``.

A path names a column, or a place inside one: ``meta.title``, ``messages.0.content``, ``messages.user`` (the last user
message before the output), ``messages.system``, ``messages.assistant`` (the last assistant message). Without a column
of its name, the only slot of a template takes the last user message, or what an Alpaca row asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvopt.errors import counted
from kvopt.task.public_layouts import CONVERSATIONS, INPUT, INSTRUCTION, MESSAGES, is_alpaca, request

DEFAULT_OUTPUT = "output"


class NoValue(Exception):
    """A row that does not give what is asked of it; the text says why, without the place."""


@dataclass(frozen=True)
class Columns:
    """Where the values of ``slots`` and the output are found in a row.

    Attributes:
        slots: the template's slot names.
        paths: slot name → path; a slot that is not in it has a column of its own name.
        output: path of the output.
    """

    slots: tuple[str, ...]
    paths: Mapping[str, str]
    output: str

    def values(self, fields: Mapping[str, Any]) -> dict[str, str]:
        """The slot values of one row. Raises NoValue."""
        self._check_alpaca(fields)
        return {slot: self._value(slot, fields) for slot in self.slots}

    def gold(self, fields: Mapping[str, Any]) -> str:
        """The output of one row, not blank. Raises NoValue."""
        path = self.output
        if path == DEFAULT_OUTPUT and path not in fields and MESSAGES in fields:
            path = f"{MESSAGES}.assistant"
            messages = fields[MESSAGES]
            if isinstance(messages, list) and messages and _role(messages[-1]) != "assistant":
                raise NoValue("the last of the messages is not the assistant's, so there is no output")
        text = as_text(find(fields, path, "the output"), f"the output ({path!r})")
        if not text.strip():
            raise NoValue("the output is empty")
        return text

    def used(self, fields: Mapping[str, Any]) -> set[str]:
        """The top-level columns that a row's values and output come from."""
        paths = [self.path(slot, fields) for slot in self.slots] + [self.output, MESSAGES]
        used = {path if path in fields else path.split(".")[0] for path in paths} | {CONVERSATIONS}
        if any(self._is_request(slot, fields) for slot in self.slots):
            used |= {INSTRUCTION, INPUT}
        from_messages = self.output not in fields or any(path.startswith(f"{MESSAGES}.") for path in paths)
        return used if from_messages else used - {MESSAGES}

    def path(self, slot: str, fields: Mapping[str, Any]) -> str:
        """The path of a slot's value in a row."""
        if slot in self.paths:
            return self.paths[slot]
        implicit = slot not in fields and len(self.slots) == 1 and MESSAGES in fields
        return f"{MESSAGES}.user" if implicit else slot

    def _is_request(self, slot: str, fields: Mapping[str, Any]) -> bool:
        """Whether a slot takes an Alpaca row's instruction and input together."""
        implicit = slot not in self.paths and slot not in fields and len(self.slots) == 1
        return implicit and is_alpaca(fields) and MESSAGES not in fields

    def _check_alpaca(self, fields: Mapping[str, Any]) -> None:
        """Refuse an Alpaca row whose input no slot takes though one takes its instruction by name. Raises NoValue."""
        by_name = INSTRUCTION in self.slots and INSTRUCTION not in self.paths
        taken = INPUT in self.slots or INPUT in self.paths.values()
        if by_name and not taken and is_alpaca(fields) and str(fields[INPUT] or "").strip():
            raise NoValue(
                "the row has an input beside its instruction, and no slot takes it; add {{input}} to the template, or"
                " name instruction in data.columns to leave it out"
            )

    def _value(self, slot: str, fields: Mapping[str, Any]) -> str:
        if self._is_request(slot, fields):
            return as_text(request(fields), f"slot {slot!r} ('instruction')")
        path = self.path(slot, fields)
        return as_text(find(fields, path, f"slot {slot!r}"), f"slot {slot!r} ({path!r})")


def find(fields: Mapping[str, Any], path: str, what: str) -> Any:
    """The value at ``path``. Raises NoValue, naming ``what`` the value is for, when there is none."""
    if path in fields:
        return fields[path]
    node: Any = fields
    for step in path.split("."):
        if isinstance(node, Mapping) and step in node:
            node = node[step]
        elif isinstance(node, list) and step.lstrip("-").isdigit() and -len(node) <= int(step) < len(node):
            node = node[int(step)]
        elif isinstance(node, list) and _last_message(node, step) is not None:
            node = _last_message(node, step)
        else:
            there = f" (the row has: {', '.join(list(fields)[:8])})"
            raise NoValue(f"{what} has no column {path!r}{there}")
    return _content(node)


def as_text(cell: Any, what: str) -> str:
    """Text as it is, numbers and booleans in their JSON spelling. Raises NoValue for anything else."""
    if isinstance(cell, bool):
        return "true" if cell else "false"
    if isinstance(cell, str):
        try:
            cell.encode("utf-8")
        except UnicodeEncodeError:
            raise NoValue(f"{what} contains half of a surrogate pair, which is not a character") from None
        return cell
    if cell is None:
        raise NoValue(f"{what} is null")
    kind = "a list" if isinstance(cell, list) else "an object" if isinstance(cell, Mapping) else type(cell).__name__
    raise NoValue(f"{what} is {kind}, not text; serialise it, e.g. with json.dumps")


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, Mapping) else None


def _last_message(messages: list[Any], role: str) -> Any:
    """The last message of ``role``; of other roles than the assistant's only what comes before its last message."""
    answers = [i for i, message in enumerate(messages) if _role(message) == "assistant"]
    upto = len(messages) if role == "assistant" or not answers else answers[-1]
    return next((m for m in reversed(messages[:upto]) if _role(m) == role), None)


def _content(value: Any) -> Any:
    """The text of a chat message or of its list of text parts; any other value as it is."""
    if isinstance(value, Mapping) and "role" in value and "content" in value:
        value = value["content"]
    if isinstance(value, list) and value and all(isinstance(p, Mapping) and p.get("type") == "text" for p in value):
        return "".join(str(part.get("text", "")) for part in value)
    return value


def unseen_messages(fields: Mapping[str, Any], columns: Columns) -> str | None:
    """What of a conversation neither a slot nor the output takes, in words; None for nothing."""
    messages = fields.get(MESSAGES)
    if not isinstance(messages, list) or MESSAGES not in columns.used(fields):
        return None
    wanted = [columns.path(slot, fields) for slot in columns.slots]
    wanted.append(columns.output if columns.output in fields else f"{MESSAGES}.assistant")
    taken = [_place(messages, path) for path in wanted]
    left = [_role(message) for i, message in enumerate(messages) if i not in taken]
    parts = ["the system message"] if "system" in left or "developer" in left else []
    if turns := sum(role not in ("system", "developer") for role in left):
        parts.append(counted(turns, "other turn"))
    return f"{' and '.join(parts)} of its conversation" if parts else None


def _place(messages: list[Any], path: str) -> int | None:
    """The position of the message that a path names, None where it names another column."""
    steps = path.split(".")
    if steps[0] != MESSAGES or len(steps) < 2:
        return None
    step = steps[1]
    if step.lstrip("-").isdigit():
        return int(step) % len(messages) if messages else None
    found = _last_message(messages, step)
    return next((i for i, message in enumerate(messages) if message is found), None)
