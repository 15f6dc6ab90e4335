"""How a context is asked for in a chat: what stands between its placeholders and the user's message, and behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvopt.export.placeholders import Placeholders
    from kvopt.export.source import Source

TRIED = ("Call Tom at 9.", "12 größere\n\nDinge", "{'a': 1}")
"""Values of a slot: for each, the ids of the chat form must be those of the whole prompt."""


@dataclass(frozen=True)
class ChatForm:
    """The text of a request is placeholders, ``before``, message, ``after``; or there is none, and ``why`` says it."""

    before: str = ""
    after: str = ""
    why: str | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """As entries of ``vllm.json``."""
        return {"no_chat": self.why} if self.why else {"chat": {"before": self.before, "after": self.after}}


def chat_form(source: Source, made: Placeholders, tokenizer: Any) -> ChatForm:
    """The chat form of a context whose run is known: its template's last message is the user's and has all slots.

    It is tried with several values: text that is tokenized in pieces can have other ids than in the whole.
    """
    template = source.run.template if source.run else None
    example = source.prompt_example()
    if template is None or example is None or not template.is_chat:
        return ChatForm(why="its template is not known, or is no chat")
    if source.scope != "leading":
        return ChatForm(why="it stands for text behind the slots too")
    slots = ["{{" + name + "}}" for name in template.slots]
    message = template.fill(dict(zip(template.slots, slots, strict=True)))[-1]
    if not isinstance(message, dict) or message["role"] != "user" or not all(s in message["content"] for s in slots):
        return ChatForm(why="its slots are not all in the last message, of the user")
    if made.text is None:
        return ChatForm(why="the tokenizer has no text for its placeholders")

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    text = message["content"]
    content = text[min(text.index(slot) for slot in slots) :].rstrip()
    head, found, after = example.text.rpartition(content)
    if not found:
        return ChatForm(why="the chat template changes the user's message")
    body = tokenizer.decode(ids(example.text)[example.replaced :], clean_up_tokenization_spaces=False)
    before = body[: -len(content + after)] if body.endswith(content + after) else ""
    if not head.endswith(before):
        return ChatForm(why="the text behind the context cannot be told from its ids")
    for value in ("", *TRIED):
        tried = content
        for slot in slots if value else []:
            tried = tried.replace(slot, value)
        whole = ids(head + tried + after)[example.replaced :]
        if ids(made.text + before + tried + after) != [*made.ids, *whole]:
            return ChatForm(why="text behind its placeholders is tokenized otherwise than in the whole prompt")
    return ChatForm(before, after)
