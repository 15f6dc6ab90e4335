"""Tests of a base's chat template, by rendering: does it keep every message, and is a whole conversation the prompt,
then the answer, then the end of the turn? Does it leave the user's own outputs as they are?

Chat templates come with the base and do as they like: they drop roles that they do not know, merge messages, write
today's date, or put an empty thinking block in front of an answer. What would make a result wrong is an error; what
the user may mean is one line of warning.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from kvopt.errors import InputError
from kvopt.task.chat_template import PLACE, ChatTemplate, Messages

_MARK = "kvoptMessage{}Mark"
_ANSWER = "kvoptAnswerMark"
SHOWN = 80  # characters of a text in a message
TWO_DAYS = (datetime(2001, 2, 3, 4, 5, 6), datetime(2012, 11, 10, 21, 43, 54))


@dataclass(frozen=True)
class ChatCheck:
    """What rendering a template showed.

    Attributes:
        before_answer: what the chat template writes between the prompt and an answer; None where a whole conversation
            does not begin with the prompt.
        after_answer: what it writes after an answer; empty where it refuses one.
        warnings: one line each, with what can be done.
        uses_clock: whether the prompt depends on the time.
        fix: how a ``before_answer`` or another beginning is mended; None where nothing is to be mended.
    """

    before_answer: str | None = ""
    after_answer: str = ""
    warnings: tuple[str, ...] = ()
    uses_clock: bool = False
    fix: str | None = None


def check_chat(chat: ChatTemplate, messages: Messages, answer_prefix: str | None = None) -> ChatCheck:
    """Render ``messages`` (slots filled with anything) in some ways, and say what the chat template does to them.

    Args:
        chat: the base's chat template.
        messages: of the template; the last is not the assistant's.
        answer_prefix: what the user says stands before every answer; None: nothing was said.

    Raises:
        InputError: a message is left out, or the chat template refuses the messages.
    """
    warnings = [*_kept(chat, messages), *_clock_warning(chat, messages)]
    uses_clock = _on_two_days(chat, messages)
    turn = _turn(chat, messages)
    if turn is None:
        warnings.append(f"{PLACE}: the base's chat template refuses or drops an answer after these messages")
        return ChatCheck(warnings=tuple(warnings), uses_clock=uses_clock)
    before, after = turn
    prompt = chat.render(messages)
    between = before[len(prompt) :] if before.startswith(prompt) else None
    fix = _mend(chat, messages, between) if between != (answer_prefix or "") else None
    if fix and answer_prefix is None:
        other = 'template.answer_prefix: "" if it is meant as it is'
        warnings.append(f"{PLACE}: {_described(prompt, before, between)} ({fix}, or {other})")
    elif answer_prefix and between and not answer_prefix.startswith(between):
        warnings.append(f"template.answer_prefix: {_described(prompt, before, between)} (begin with that)")
    return ChatCheck(between, after, tuple(warnings), uses_clock, fix)


# ---- messages


def _kept(chat: ChatTemplate, messages: Messages) -> list[str]:
    """Warnings about messages that are merged, moved, repeated, changed or given another role. Raises InputError for
    one that is left out.
    """
    marks = [_MARK.format(i) for i in range(len(messages))]
    text = chat.render([{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)])
    names = [f"message {i} ({message['role']})" for i, message in enumerate(messages)]
    for mark, name, message in zip(marks, names, messages, strict=True):
        if mark not in text and message["content"].strip():
            raise InputError(
                f"the base's chat template drops {name}",
                where=PLACE,
                fix="give it a role that the chat template has, or put its text into the user's message",
            )
    warnings = [f"repeats {name}" for mark, name in zip(marks, names, strict=True) if text.count(mark) > 1]
    places = [text.find(mark) for mark in marks]
    for i in range(1, len(marks)):
        between = text[places[i - 1] + len(marks[i - 1]) : places[i]]
        if -1 < places[i] < places[i - 1]:
            warnings.append(f"moves {names[i]} in front of {names[i - 1]}")
        elif places[i] > -1 < places[i - 1] and not between.strip():
            warnings.append(f"merges {names[i - 1]} with {names[i]} into one turn")
    return [f"{PLACE}: the base's chat template {what}" for what in [*warnings, *_changed(chat, messages, names)]]


def _changed(chat: ChatTemplate, messages: Messages, names: Sequence[str]) -> list[str]:
    text = chat.render(messages)
    warnings = []
    for i, (message, name) in enumerate(zip(messages, names, strict=True)):
        content = message["content"]
        if content.strip() not in text:
            warnings.append(f"changes the text of {name}")
        elif content not in text:
            warnings.append(f"strips the white space around {name}")
        if message["role"] not in ("user", "assistant") and text == _with_role(chat, messages, i, "user"):
            warnings.append(f"gives {name} the user's role")
    return warnings


def _with_role(chat: ChatTemplate, messages: Messages, index: int, role: str) -> str | None:
    try:
        return chat.render([{**m, "role": role} if i == index else m for i, m in enumerate(messages)])
    except InputError:
        return None


# ---- the clock


def _on_two_days(chat: ChatTemplate, messages: Messages, **kwargs: Any) -> bool:
    """Whether the prompt differs between two days."""
    if "strftime_now" not in (chat.source or ""):
        return False
    texts = {ChatTemplate(chat.tokenizer, chat.kwargs, day).render(messages, **kwargs) for day in TWO_DAYS}
    return len(texts) > 1


def _clock_warning(chat: ChatTemplate, messages: Messages) -> list[str]:
    if not _on_two_days(chat, messages):
        return []
    today = f"{datetime.now():%d %b %Y}"
    setters = [name for name in chat.variables if not _on_two_days(chat, messages, **{name: today})]
    fix = f"set template.chat_kwargs: {{{setters[0]}: {today}}}" if setters else "it has no argument that sets it"
    what = "writes the date or the time into the prompt, which a run keeps as it was when it began"
    return [f"{PLACE}: the base's chat template {what} ({fix})"]


# ---- the answer's turn


def _turn(chat: ChatTemplate, messages: Messages, **kwargs: Any) -> tuple[str, str] | None:
    """The texts before and after an answer in a whole conversation; None where the template refuses or drops it."""
    try:
        whole = chat.render([*messages, {"role": "assistant", "content": _ANSWER}], prompt=False, **kwargs)
    except InputError:
        return None
    before, found, after = whole.rpartition(_ANSWER)
    return (before, after) if found else None


def changed_output(chat: ChatTemplate, messages: Messages, output: str) -> str | None:
    """What the chat template does to an output of the user's in a finished conversation: white space that it strips,
    thinking that it removes, JSON that it writes in its own way. None where the output stands there as it is, or where
    no answer may stand at all.
    """
    turn = _turn(chat, messages)
    if turn is None:
        return None
    before, after = turn
    try:
        whole = chat.render([*messages, {"role": "assistant", "content": output}], prompt=False)
    except InputError as error:
        return f"refuses the output: {error.__cause__}"
    if whole == (plain := before + output + after):
        return None
    at = _parting(whole, plain)
    if at < len(before) or not whole.endswith(after):
        return f"renders the turn otherwise for the output: {_shown(whole[at:])} in place of {_shown(plain[at:])}"
    found = whole[len(before) : len(whole) - len(after)]
    if found == output.strip():
        return "strips the white space around the output"
    if found and output.rstrip().endswith(found.strip()):
        return f"leaves {_shown(output[: len(output.rstrip()) - len(found.strip())])} out of the output"
    return f"changes the output {_shown(output)} to {_shown(found)}"


def _described(prompt: str, before: str, between: str | None) -> str:
    if between is not None:
        return f"the base's chat template puts {_shown(between)} between the prompt and the answer"
    if prompt.startswith(before):
        return (
            f"the base's chat template ends the prompt with {_shown(prompt[len(before) :])}, which stands before no"
            " finished answer"
        )
    at = _parting(prompt, before)
    return (
        "the base's chat template renders a whole conversation otherwise than the prompt:"
        f" {_shown(before[at:])} in place of {_shown(prompt[at:])}"
    )


def _parting(one: str, other: str) -> int:
    """The first place where two texts differ."""
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)


def _mend(chat: ChatTemplate, messages: Messages, between: str | None) -> str:
    """What the user can do about a prompt and answer that do not join: arguments of the chat template that make them
    join, else what to write before the answer.
    """
    for name in chat.variables:
        for value in (False, True):
            turn = _turn(chat, messages, **{name: value})
            if turn is not None and turn[0] == chat.render(messages, **{name: value}):
                setting = f"template.chat_kwargs: {{{name}: {json.dumps(value)}}}"
                other = f" or template.answer_prefix: {json.dumps(between)}" if between else ""
                return f"set {setting}{other}"
    if between:
        return f"set template.answer_prefix: {json.dumps(between)}"
    return "set template.answer_prefix to what the base says before it answers"


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN else text[: SHOWN - 1] + "…")


def end_of_turn(after: str, ends: Sequence[str]) -> str | None:
    """The beginning of ``after``, up to and with the first of ``ends`` (control tokens); None where white space is not
    all that stands before one.
    """
    longest_first = sorted(ends, key=len, reverse=True)
    match = re.match(rf"\s*?(?:{'|'.join(map(re.escape, longest_first))})", after) if ends else None
    return match[0] if match else None
