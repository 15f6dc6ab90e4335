"""Whole wordings from a chat endpoint, several in one call: each of another family, and other than those accepted so
far, which the call shows. The families are those that ``docs/your-own.md`` names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvopt.base.chat_endpoint import ChatFailure
from kvopt.mutate.generators.endpoint import AskingGenerator, unanswered
from kvopt.mutate.proposals import Proposal, Request
from kvopt.mutate.validity import Rejection
from kvopt.task.template import Template

if TYPE_CHECKING:
    pass

SYSTEM = (
    "You write other wordings of a prompt template. Each demands exactly the same of an answer: every rule is kept, none is added, weakened or contradicted; "  # noqa: E501
    "labels, keys, the answer's format, numbers and quoted examples stay as they are, letter by letter. Slots such as {{name}} stand once each, unchanged. "  # noqa: E501
    "Keep the number of messages and their roles. Reply with a JSON array alone: one object for each wording that is asked for, in order, each like the template's JSON."  # noqa: E501
)
WAYS = {
    "rewording": "other words and sentence structures throughout",
    "structure": "another structure: headings, Markdown, XML, JSON, YAML, a list in place of prose or prose in place of a list",  # noqa: E501
    "mood": "another grammatical mood: imperative, declarative, second person, conditional",
    "style": "another style: legal, chatty, terse, a specification, questions and answers, a letter",
    "role": "the task put as a role or a situation",
    "longer": "longer: the same rules, explained at more length",
    "shorter": "shorter: the same rules in as few words as they take",
    "reordering": "the rules and parts in another order",
    "placement": "content moved between the messages",
}
DISTANCES = {
    "near": "Stay close: most sentences, or their order, are the template's.",
    "middle": "Sentences or structure are new.",
    "far": "Be far from the template: style, structure, length or place are quite different, too.",
}
SHOWN = 8
"""How many accepted wordings a call shows, the last ones: they cost tokens."""


class EndpointWordings(AskingGenerator):
    """Wordings of the whole template, of ``config.families`` and at ``config.distance``, ``config.at_once`` a call."""

    def propose(self, requests: Sequence[Request]) -> list[Proposal]:
        """All of them in one call; those that its answer lacks are rejections."""
        families = [self.config.families[request.turn % len(self.config.families)] for request in requests]
        first = requests[0]
        asked = question(first.template, first.accepted, families, self.config.distance)
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": asked}]
        try:
            with self.chat.client() as client:
                answer = self.chat.ask(client, messages, first.seed % 2**31)
        except ChatFailure as error:
            return [Proposal(rejection=unanswered(error)) for _ in requests]
        written = wordings_in(answer)
        told = "the answer is no JSON array" if written is None else f"the answer holds {len(written)} wordings"
        lacking = Rejection("generation-failed", f"{told}; {len(requests)} were asked for: {answer[:120]!r}")
        found = written or []
        return [
            _proposal(first.template, found[i], family, self.config.distance)
            if i < len(found)
            else Proposal(rejection=lacking, operators=(self.name, family))
            for i, family in enumerate(families)
        ]


def question(template: Template, accepted: Sequence[Template], families: Sequence[str], distance: str | None) -> str:
    """What the model is asked: the template, what is there already, and a line for each wording that is wanted."""
    there = "".join(f"{_json(one)}\n" for one in accepted[-SHOWN:])
    differ = f"Wordings that exist; yours differ from them and from each other:\n{there}\n" if there else ""
    wanted = "\n".join(f"{number}. {WAYS[family]}" for number, family in enumerate(families, 1))
    how = f"{DISTANCES[distance]} " if distance else ""
    return f"The template:\n{_json(template)}\n\n{differ}{how}Write {len(families)}, a JSON array:\n{wanted}"


def _json(template: Template) -> str:
    return json.dumps(template.to_json(), ensure_ascii=False)


def wordings_in(answer: str) -> list[Any] | None:
    """The items of the JSON array in an answer, perhaps in a code fence or after other text; None without one."""
    for start in re.finditer(r"\[\s*[{\"\[]", answer):
        try:
            value, _ = json.JSONDecoder().raw_decode(answer, start.start())
        except ValueError:
            continue
        return value if isinstance(value, list) else None
    return None


def _proposal(template: Template, value: Any, family: str, distance: str | None) -> Proposal:
    """One item of an answer as a candidate."""
    operators = ("endpoint", family)
    texts = _texts(template, value)
    if isinstance(texts, str):
        return Proposal(rejection=Rejection("generation-failed", texts), operators=operators)
    detail = f"{family}, {distance}" if distance else family
    try:
        "".join(texts).encode("utf-8")  # JSON can write half of a surrogate pair, which is not a character
        return Proposal(template.with_fields(texts), detail=detail, operators=operators, written=True)
    except ValueError as error:
        return Proposal(rejection=Rejection("generation-failed", str(error)), operators=operators)


def _texts(template: Template, value: Any) -> list[str] | str:
    """The texts of an item's fields, or what is wrong with it."""
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        value = value["messages"]
    if not template.is_chat:
        text = value.get("text") if isinstance(value, dict) else value
        return [text] if isinstance(text, str) else "an item without text"
    messages = value if isinstance(value, list) else []
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    if roles != [message.role for message in template.messages]:
        return "an item with other messages than the template's"
    texts = [message.get("content") for message in messages]
    if not all(isinstance(text, str) for text in texts):
        return "a message without content"
    return [_as_in(original, text) for original, text in zip(template.fields, texts, strict=True)]


def _as_in(original: str, text: str) -> str:
    """The text with the white space at both ends that the template's has: models drop it."""
    start = original[: len(original) - len(original.lstrip())]
    return start + text.strip() + original[len(original.rstrip()) :]
