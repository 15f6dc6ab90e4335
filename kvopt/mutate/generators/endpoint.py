"""Paraphrases from any OpenAI-compatible chat endpoint; a failure of the endpoint is a rejection with its reason, and
the next search asks for it again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from kvopt.base.chat_endpoint import ChatEndpoint, ChatFailure
from kvopt.config.mutations import EndpointGenerator
from kvopt.mutate.proposals import Proposal, Request, marked
from kvopt.mutate.sanity import sanity
from kvopt.mutate.spans import MARK, Field, MarkError
from kvopt.mutate.validity import REQUEST_FAILED, Rejection

if TYPE_CHECKING:
    import httpx

SYSTEM = (
    "You rewrite the instructions of a prompt so that they mean exactly the same in other words. Markers such as [K1] stand for parts that must not change: "  # noqa: E501
    "copy each of them exactly once, where it belongs, and add none. Leave out nothing, add nothing, answer nothing. Reply with the rewritten text alone."  # noqa: E501
)
SYSTEM_MESSAGE = {"role": "system", "content": SYSTEM}
WAYS = (
    "Rewrite it in other words.",
    "Rewrite it and make it terser.",
    "Rewrite it in a more formal tone.",
    "Rewrite it in a friendlier tone.",
    "Rewrite it as a list of short instructions.",
    "Rewrite it as flowing prose.",
    "Rewrite it with other sentence structures.",
    "Rewrite it in the simplest words.",
    "Rewrite it and change the order of what can change places.",
    "Rewrite it as a careful domain expert would put it.",
)
LEAST_WORDS = 4


@dataclass
class AskingGenerator:
    """A generator that asks a chat model behind ``config.base_url``.

    Args:
        config: address, model, retries, concurrency, and what is asked for.
        first_wait: seconds before the first repeat; doubles with each.
        transport: an httpx transport in the place of the network's.
        say: gets a line where the model has no system role; None: stderr does.
    """

    config: EndpointGenerator
    first_wait: float = 1.0
    transport: httpx.BaseTransport | None = None
    say: Callable[[str], None] | None = None
    name: str = "endpoint"
    family: str = "paraphrase"
    limit: int | None = None

    def __post_init__(self) -> None:
        self.batch = self.config.at_once if self.config.families else self.config.concurrency
        said = {"say": self.say} if self.say else {}
        self.chat = ChatEndpoint(self.config, "mutations.generator", self.first_wait, self.transport, **said)


def unanswered(failure: ChatFailure) -> Rejection:
    """What a request comes to that got no answer."""
    return Rejection("generation-failed" if failure.answered else REQUEST_FAILED, str(failure))


class EndpointParaphraser(AskingGenerator):
    """Rewrites whole fields, one a request, several requests at once."""

    def propose(self, requests: Sequence[Request]) -> list[Proposal]:
        with self.chat.client() as client, ThreadPoolExecutor(self.config.concurrency) as pool:
            return list(pool.map(lambda request: self._propose(client, request), requests))

    def _propose(self, client: httpx.Client, request: Request) -> Proposal:
        way = WAYS[request.turn % len(WAYS)]
        sources, fields = list(request.template.fields), request.fields
        rewritten = 0
        for i, field in enumerate(fields):
            if len(re.sub(MARK, " ", field.text).split()) < LEAST_WORDS:
                continue
            rewrite = self._rewrite(client, field, way, Random(f"{request.seed}:{i}").randrange(2**31))
            if isinstance(rewrite, Rejection):
                return Proposal(rejection=rewrite)
            sources[i] = rewrite
            rewritten += 1
        if not rewritten:
            return Proposal(rejection=Rejection("not-applicable", "no field with enough words"))
        return Proposal(request.template.with_fields(sources), detail=way)

    def _rewrite(self, client: httpx.Client, field: Field, way: str, seed: int) -> str | Rejection:
        """The source of a rewritten field, or why there is none."""
        form = marked(field.text)
        try:
            answer = self.chat.ask(client, [SYSTEM_MESSAGE, {"role": "user", "content": f"{way}\n\n{form.text}"}], seed)
        except ChatFailure as error:
            return unanswered(error)
        if not field.text.endswith((" ", "\n")) or field.fixed_end:
            answer = answer.strip()
        restored = form.restore(answer)
        if isinstance(restored, Rejection):
            return restored
        if rejection := sanity(field.text, restored):
            return rejection
        try:
            return field.unmask(restored)
        except MarkError as error:
            return Rejection("changed-outside-scope", str(error))
