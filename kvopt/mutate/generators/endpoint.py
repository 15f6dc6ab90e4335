"""Paraphrases from any OpenAI-compatible chat endpoint. Failures are retried, then reported as failures; the key goes
into a header and nowhere else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from random import Random

import httpx
import tenacity

from kvopt.errors import InputError
from kvopt.mutate.config import EndpointGenerator
from kvopt.mutate.generators.base import Proposal, Request, marked
from kvopt.mutate.sanity import sanity
from kvopt.mutate.spans import MARK, Field, MarkError
from kvopt.mutate.validity import Rejection

SYSTEM = (
    "You rewrite the instructions of a prompt so that they mean exactly the same in other words. Markers such as [K1] stand for parts that must not change: "  # noqa: E501
    "copy each of them exactly once, where it belongs, and add none. Leave out nothing, add nothing, answer nothing. Reply with the rewritten text alone."  # noqa: E501
)
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
LONGEST_WAIT = 60.0
LEAST_WORDS = 4


class _Transient(Exception):
    """A failure that another try may mend; ``after`` is what the server asks to wait, in seconds."""

    def __init__(self, message: str, after: float | None = None):
        super().__init__(message)
        self.after = after


class _Failed(Exception):
    """A failure that another try would repeat."""


@dataclass
class EndpointParaphraser:
    """Rewrites of whole fields by a chat model behind ``config.base_url``.

    Args:
        config: address, model, retries, concurrency.
        first_wait: seconds before the first repeat; doubles with each.
        transport: an httpx transport in the place of the network's.
    """

    config: EndpointGenerator
    first_wait: float = 1.0
    transport: httpx.BaseTransport | None = None
    name: str = "endpoint"
    limit: int | None = None

    def __post_init__(self) -> None:
        self.batch = self.config.concurrency
        self._key = os.environ.get(self.config.api_key_env, "") if self.config.api_key_env else ""
        if self.config.api_key_env and not self._key:
            raise InputError(
                f"environment variable {self.config.api_key_env} is not set",
                where="mutations.generator.api_key_env",
                mend="export the key, or drop the line for an endpoint without one",
            )

    def propose(self, requests: Sequence[Request]) -> list[Proposal]:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        client = httpx.Client(timeout=self.config.timeout, headers=headers, transport=self.transport)
        with client, ThreadPoolExecutor(self.config.concurrency) as pool:
            return list(pool.map(lambda request: self._propose(client, request), requests))

    def _propose(self, client: httpx.Client, request: Request) -> Proposal:
        way = WAYS[request.turn % len(WAYS)]
        sources, fields = list(request.template.fields), request.fields
        rewritten = 0
        for i, one in enumerate(fields):
            if len(re.sub(MARK, " ", one.text).split()) < LEAST_WORDS:
                continue
            made = self._rewrite(client, one, way, Random(f"{request.seed}:{i}").randrange(2**31))
            if isinstance(made, Rejection):
                return Proposal(rejection=made)
            sources[i] = made
            rewritten += 1
        if not rewritten:
            return Proposal(rejection=Rejection("not-applicable", "no field with enough words"))
        return Proposal(request.template.with_fields(sources), detail=way)

    def _rewrite(self, client: httpx.Client, one: Field, way: str, seed: int) -> str | Rejection:
        """The source of a rewritten field, or why there is none."""
        form = marked(one.text)
        try:
            answer = self._ask(client, f"{way}\n\n{form.text}", seed)
        except (_Failed, _Transient) as error:
            return Rejection("generation-failed", self._without_key(str(error)))
        if not one.text.endswith((" ", "\n")) or one.fixed_end:
            answer = answer.strip()
        restored = form.restore(answer)
        if isinstance(restored, Rejection):
            return restored
        if rejection := sanity(one.text, restored):
            return rejection
        try:
            return one.unmask(restored)
        except MarkError as error:
            return Rejection("changed-outside-scope", str(error))

    def _ask(self, client: httpx.Client, text: str, seed: int) -> str:
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.config.retries + 1),
            wait=self._wait,
            retry=tenacity.retry_if_exception_type(_Transient),
            reraise=True,
        )
        return retrying(self._ask_once, client, text, seed)

    def _wait(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        wait = min(LONGEST_WAIT, self.first_wait * 2 ** (state.attempt_number - 1))
        return min(LONGEST_WAIT, max(wait, error.after)) if isinstance(error, _Transient) and error.after else wait

    def _ask_once(self, client: httpx.Client, text: str, seed: int) -> str:
        url = self.config.base_url
        url = url if url.endswith("/chat/completions") else f"{url}/chat/completions"
        body = {
            "model": self.config.model,
            "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}],
            "temperature": self.config.temperature,
            "seed": seed,
        }
        try:
            response = client.post(url, json=body)
        except httpx.TransportError as error:
            raise _Transient(f"{type(error).__name__}: {error}") from None
        if response.status_code == 429 or response.status_code >= 500:
            raise _Transient(f"status {response.status_code}", _seconds(response.headers.get("retry-after")))
        if response.status_code != 200:
            raise _Failed(f"status {response.status_code}: {response.text[:200]}")
        return _content(response)

    def _without_key(self, message: str) -> str:
        return message.replace(self._key, "***") if self._key else message


def _seconds(value: str | None) -> float | None:
    try:
        return max(0.0, float(value)) if value else None
    except ValueError:
        return None


def _content(response: httpx.Response) -> str:
    """The text of the first choice. Raises _Failed for anything that is not a finished, non-empty answer."""
    try:
        choice = response.json()["choices"][0]
        content = choice["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise _Failed(f"not a chat completion: {response.text[:200]}") from None
    if not isinstance(content, str) or not content.strip():
        raise _Failed("an empty answer")
    if choice.get("finish_reason") == "length":
        raise _Failed("the answer was cut off at the token limit")
    return content
