"""A base's chat template: messages become the text that production feeds, at a time that stays the same in a run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from kvopt.errors import InputError

Messages = Sequence[Mapping[str, str]]
PLACE = "template.messages"
_OWN_NAMES = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now", "namespace", "dict"}
)


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of one tokenizer.

    Args:
        tokenizer: a transformers tokenizer.
        kwargs: further arguments of ``apply_chat_template``, e.g. ``{"enable_thinking": False}``.
        now: what the template's clock (``strftime_now``) says; None: the time of the call.
    """

    tokenizer: Any
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    now: datetime | None = None

    def render(self, messages: Messages, *, prompt: bool = True, **kwargs: Any) -> str:
        """The text of ``messages``; with ``prompt``, up to where the answer begins. Raises InputError for what the
        template refuses.
        """
        if self.source is None:
            raise InputError(
                "this base's tokenizer has no chat template",
                where=PLACE,
                fix="use template.text, or an instruction-tuned base",
            )
        return self._apply(messages, tokenize=False, add_generation_prompt=prompt, **kwargs)

    def ids(self, messages: Messages) -> list[int]:
        """The ids of a prompt as the tokenizer's own call gives them. Raises InputError as :meth:`render`."""
        found = self._apply(messages, tokenize=True, add_generation_prompt=True)
        return list(found["input_ids"] if isinstance(found, Mapping) else found)

    def _apply(self, messages: Messages, **options: Any) -> Any:
        try:
            with _clock(self.now):
                return self.tokenizer.apply_chat_template([dict(m) for m in messages], **{**self.kwargs, **options})
        except Exception as error:  # Jinja templates raise whatever they like
            raise InputError(
                f"the base's chat template refuses these messages: {error}",
                where=PLACE,
                fix="give other roles, or put a system message's text at the start of the first user message",
            ) from error

    def render_own(self, messages: Messages) -> str:
        """The prompt of messages that kvopt itself wrote: a system message that the template refuses or drops goes in
        front of the first user message. Raises InputError where the template refuses that too.
        """
        if not messages or messages[0]["role"] != "system":
            return self.render(messages)
        try:
            text = self.render(messages)
        except InputError:
            text = ""
        return text if messages[0]["content"].strip() in text else self.render(system_in_front(messages))

    @property
    def source(self) -> str | None:
        """The template's Jinja text, None without one; of several, the one that messages without tools take."""
        template = getattr(self.tokenizer, "chat_template", None)
        return template.get("default") if isinstance(template, Mapping) else template

    @property
    def variables(self) -> list[str]:
        """The names that the template reads beside messages, tools and special tokens: what ``kwargs`` can set."""
        from jinja2 import Environment, TemplateError, meta

        source = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", self.source or "")
        try:
            names = meta.find_undeclared_variables(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source))
        except TemplateError:
            return []
        return sorted(name for name in names - _OWN_NAMES if not name.endswith("_token"))


def system_in_front(messages: Messages) -> list[dict[str, str]]:
    """The same conversation for a model without a system role: its text begins the first user message."""
    system, *rest = [dict(message) for message in messages]
    first = next(i for i, message in enumerate(rest) if message["role"] == "user")
    rest[first]["content"] = f"{system['content']}\n\n{rest[first]['content']}"
    return rest


@contextmanager
def _clock(now: datetime | None) -> Iterator[None]:
    """While this lasts, the chat templates of transformers see this time. A library without that clock keeps its own,
    which :func:`kvopt.task.chat_check.check_chat` notices.
    """
    from transformers.utils import chat_template_utils

    theirs = getattr(chat_template_utils, "datetime", None)
    if now is None or theirs is None:
        yield
        return
    stopped = type("Stopped", (datetime,), {"now": classmethod(lambda cls, tz=None: now)})
    chat_template_utils.datetime = stopped  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        chat_template_utils.datetime = theirs  # type: ignore[misc]
