"""From a template and slot values to the prompt's text, as production renders it, with the characters that each slot
value occupies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from kvopt.errors import InputError
from kvopt.task.chat_check import ChatCheck, check_chat, end_of_turn
from kvopt.task.chat_template import PLACE, ChatTemplate
from kvopt.task.plain_tokens import control_tokens
from kvopt.task.template import Slot, Static, Template, parse

_SENTINEL = "kvoptSlot{}Mark"
_SENTINEL_PATTERN = re.compile(r"kvoptSlot(\d+)Mark")


@dataclass(frozen=True)
class Rendered:
    """A prompt's text; ``slots`` are the (start, end) character spans of the slot values, in order."""

    text: str
    slots: tuple[tuple[int, int], ...]

    @property
    def first_slot(self) -> int:
        return self.slots[0][0]


@dataclass
class Renderer:
    """Renders a template for one tokenizer.

    A chat template may trim a message; the slot values found in the text are then the trimmed ones. Any other change
    of a value (escaping, rewording, dropping it) is an error, because the seam between context and body could not be
    placed.

    Args:
        tokenizer: its chat template is used for chat templates; text templates are rendered without it.
        chat_kwargs: further arguments of ``apply_chat_template``, e.g. ``{"enable_thinking": False}``.
        answer_prefix: what the user says stands between a prompt and every answer; None: nothing was said.
        now: what the chat template's clock says; None: the time of the call.
    """

    tokenizer: Any
    chat_kwargs: Mapping[str, Any] = field(default_factory=dict)
    answer_prefix: str | None = None
    now: datetime | None = None

    def __post_init__(self) -> None:
        self.chat = ChatTemplate(self.tokenizer, self.chat_kwargs, self.now)
        self._skeletons: dict[Template, tuple[list[str], list[str]]] = {}
        self._checks: dict[tuple[str, ...], ChatCheck] = {}

    def render(self, template: Template, values: Mapping[str, str], *, where: str = "") -> Rendered:
        """The prompt up to where the model's answer begins. Raises InputError with ``where`` when a value cannot be
        found in it.
        """
        statics, names = self._skeleton(template)
        if not template.is_chat:
            return _interleave(statics, [values[name] for name in names])
        messages = template.fill(values)
        assert not isinstance(messages, str)
        text = self.chat.render(messages)
        rendered = _interleave(statics, [values[name] for name in names])
        if rendered.text == text:
            return rendered
        return _locate(text, statics, [values[name] for name in names], where)

    def check(self, template: Template) -> ChatCheck:
        """What the chat template does to the messages of a chat template, tested once for each sequence of roles.
        Raises InputError for a message that it leaves out.
        """
        roles = tuple(message.role for message in template.messages)
        if roles not in self._checks:
            self._checks[roles] = check_chat(self.chat, _with_sentinels(template), self.answer_prefix)
        return self._checks[roles]

    def end_of_answer(self, template: Template) -> str:
        """What follows a finished answer, up to and with the token that ends it: the chat template's end of turn, or
        the EOS token.
        """
        eos = self.tokenizer.eos_token or ""
        if not template.is_chat:
            return eos
        ends = self.tokenizer.convert_ids_to_tokens(sorted(control_tokens(self.tokenizer)))
        return end_of_turn(self.check(template).after_answer, ends) or eos

    def _skeleton(self, template: Template) -> tuple[list[str], list[str]]:
        """Static texts around the slots (one more than slots) and the slot names in order, of the rendered prompt."""
        if template not in self._skeletons:
            names = list(template.slot_sequence)
            if template.is_chat:
                self.check(template)
                pieces = _SENTINEL_PATTERN.split(self.chat.render(_with_sentinels(template)))
                if pieces[1::2] != [str(i) for i in range(len(names))]:
                    raise InputError("the base's chat template repeats or reorders messages", where=PLACE)
                statics = pieces[::2]
            else:
                parts = parse(template.text or "")
                statics = [""]
                for part in parts:
                    if isinstance(part, Static):
                        statics[-1] += part.text
                    else:
                        statics.append("")
            self._skeletons[template] = (statics, names)
        return self._skeletons[template]


def _with_sentinels(template: Template) -> list[dict[str, str]]:
    count = 0
    messages = []
    for message in template.messages:
        content = ""
        for part in parse(message.content):
            if isinstance(part, Slot):
                content += _SENTINEL.format(count)
                count += 1
            else:
                content += part.text
        messages.append({"role": message.role, "content": content})
    return messages


def _interleave(statics: list[str], values: list[str]) -> Rendered:
    text, spans = statics[0], []
    for value, static in zip(values, statics[1:], strict=True):
        spans.append((len(text), len(text) + len(value)))
        text += value + static
    return Rendered(text, tuple(spans))


def _locate(text: str, statics: list[str], values: list[str], where: str) -> Rendered:
    pattern = re.escape(statics[0])
    for value, static in zip(values, statics[1:], strict=True):
        variants = dict.fromkeys([value, value.strip(), value.lstrip(), value.rstrip()])
        pattern += "(" + "|".join(map(re.escape, variants)) + ")" + re.escape(static)
    match = re.fullmatch(pattern, text)
    if match is None:
        raise InputError(
            "the base's chat template changes a slot value, so kvopt cannot tell where the value begins and ends",
            where=where,
            fix="use template.text with the chat markup written out",
        )
    return Rendered(text, tuple(match.span(i + 1) for i in range(len(values))))
