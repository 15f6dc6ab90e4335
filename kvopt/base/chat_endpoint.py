"""A client of any OpenAI-compatible chat endpoint: what may pass is asked again, everything else is a failure with a
reason. The key goes into a header and nowhere else.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from threading import Lock
from typing import TYPE_CHECKING

from kvopt.config.mutations import EndpointSettings
from kvopt.errors import InputError, missing_extra
from kvopt.task.chat_template import system_in_front

if TYPE_CHECKING:
    import httpx
    import tenacity

LONGEST_WAIT = 60.0
REFUSES_SYSTEM = re.compile(r"\broles?\b|\bsystem[ _-]*(message|prompt|instruction)", re.IGNORECASE)
"""What an answer says that is no completion, where the model behind the endpoint may have no system role."""
THOUGHTS = re.compile(r"\A\s*<(think|thinking|reasoning)>.*?(?:</\1>|\Z)", re.S | re.I)
"""What a reasoning model writes before its answer, where the endpoint does not part the two."""
OPTIONAL = ("seed", "temperature", "max_tokens")
"""Settings of a request that are left out where an endpoint refuses them by name."""
GIVEN_UP_AFTER = 3
"""After so many questions in a row that no try could bring to the endpoint, each of the next ones has one try: hundreds
of them would else wait for a server that is not there.
"""


class ChatFailure(Exception):
    """No answer that can be used: another try would fail the same way, or the tries are used up. The message never
    holds the key.

    Attributes:
        answered: whether the model answered, only with nothing that can be used; else the request failed, and another
            time it may not.
    """

    def __init__(self, message: str, answered: bool = False):
        super().__init__(message)
        self.answered = answered


class _Transient(Exception):
    """A failure that another try may fix; ``after`` is what the server asks to wait, in seconds."""

    def __init__(self, message: str, after: float | None = None):
        super().__init__(message)
        self.after = after


class _Unreachable(_Transient):
    """The request did not arrive, or no answer came back."""


@dataclass
class ChatEndpoint:
    """One chat model behind ``settings.base_url``; may be called from several threads at once.

    Args:
        settings: address, model, key, retries.
        where: the config key that error messages name.
        first_wait: seconds before the first repeat; doubles with each.
        transport: an httpx transport in the place of the network's.
        say: gets a line where the model turns out to have no system role; default: stderr.

    Attributes:
        usage: ``prompt_tokens`` and ``completion_tokens`` of all answers, where the endpoint counts them.
    """

    settings: EndpointSettings
    where: str
    first_wait: float = 1.0
    transport: httpx.BaseTransport | None = None
    say: Callable[[str], None] = field(default=lambda line: print(line, file=sys.stderr, flush=True), repr=False)
    usage: dict[str, int] = field(default_factory=dict, init=False, repr=False)
    _key: str = field(init=False, repr=False)
    _not_reached: int = field(default=0, init=False, repr=False)
    _no_system: bool = field(default=False, init=False, repr=False)
    _refused: set[str] = field(default_factory=set, init=False, repr=False)
    _lock: Lock = field(default_factory=Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        """Raises InputError without the extra ``endpoint`` (httpx, tenacity), or a key that is not set."""
        if not (find_spec("httpx") and find_spec("tenacity")):
            raise missing_extra("endpoint", "asking a model at an endpoint", self.where)
        self._key = os.environ.get(self.settings.api_key_env, "") if self.settings.api_key_env else ""
        if self.settings.api_key_env and not self._key:
            raise InputError(
                f"environment variable {self.settings.api_key_env} is not set",
                where=f"{self.where}.api_key_env",
                fix="export the key, or drop the line for an endpoint without one",
            )

    def client(self) -> httpx.Client:
        """A connection pool for some calls of :meth:`ask`; use it in a ``with`` block."""
        import httpx

        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        return httpx.Client(timeout=self.settings.timeout, headers=headers, transport=self.transport)

    def ask(self, client: httpx.Client, messages: Sequence[dict[str, str]], seed: int) -> str:
        """The text of the answer. Raises ChatFailure when there is none.

        A system message that the endpoint refuses is sent in front of the user's instead, then and from then on.
        """
        import tenacity

        tries = self.settings.retries + 1 if self._not_reached < GIVEN_UP_AFTER else 1
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(tries),
            wait=self._wait,
            retry=tenacity.retry_if_exception_type(_Transient),
            reraise=True,
        )
        try:
            answer = retrying(self._ask_once, client, messages, seed)
        except (_Transient, ChatFailure) as error:
            self._not_reached = self._not_reached + 1 if isinstance(error, _Unreachable) else 0
            answered = isinstance(error, ChatFailure) and error.answered
            raise ChatFailure(self._without_key(str(error)), answered) from None
        self._not_reached = 0
        return answer

    def _wait(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        wait = min(LONGEST_WAIT, self.first_wait * 2 ** (state.attempt_number - 1))
        return min(LONGEST_WAIT, max(wait, error.after)) if isinstance(error, _Transient) and error.after else wait

    def _ask_once(self, client: httpx.Client, messages: Sequence[dict[str, str]], seed: int) -> str:
        merges = bool(messages) and messages[0]["role"] == "system"
        if merges and self._no_system:
            return self._read(self._post(client, system_in_front(messages), seed))
        response = self._post(client, messages, seed)
        if merges and response.status_code not in (200, 429) and REFUSES_SYSTEM.search(response.text):
            merged = self._post(client, system_in_front(messages), seed)
            if merged.status_code == 200:
                self._merge_from_now_on()
                response = merged
        return self._read(response)

    def _read(self, response: httpx.Response) -> str:
        if response.status_code == 200:
            with suppress(ValueError, AttributeError), self._lock:
                for name, count in (response.json().get("usage") or {}).items():
                    if name in ("prompt_tokens", "completion_tokens") and isinstance(count, int):
                        self.usage[name] = self.usage.get(name, 0) + count
        return _content_or_failure(response)

    def _merge_from_now_on(self) -> None:
        with self._lock:
            if not self._no_system:
                self._no_system = True
                what = "the endpoint refuses system messages; kvopt puts their text in front of the user's message"
                self.say(f"warning: {self.where}: {what}")

    def _post(self, client: httpx.Client, messages: Sequence[dict[str, str]], seed: int) -> httpx.Response:
        import httpx

        url = self.settings.base_url
        url = url if url.endswith("/chat/completions") else f"{url}/chat/completions"
        asked = {
            "temperature": self.settings.temperature,
            "seed": seed if self.settings.send_seed else None,
            "max_tokens": self.settings.max_tokens,
        }
        body: dict[str, object] = {"model": self.settings.model, "messages": list(messages)}
        body |= {name: value for name, value in asked.items() if value is not None and name not in self._refused}
        try:
            response = client.post(url, json=body | (self.settings.extra_body or {}))
            if response.status_code in (400, 422) and (field := self._refused_in(response.text, body)):
                del body[field]
                again = client.post(url, json=body | (self.settings.extra_body or {}))
                if again.status_code == 200:
                    self._leave_out(field)
                    return again
            return response
        except httpx.TransportError as error:
            raise _Unreachable(f"{type(error).__name__}: {error}") from None
        except (httpx.RequestError, httpx.InvalidURL) as error:
            raise ChatFailure(f"{type(error).__name__}: {error}") from None

    @staticmethod
    def _refused_in(text: str, body: dict[str, object]) -> str | None:
        """A setting of the request that a refusal names."""
        return next((name for name in OPTIONAL if name in body and re.search(rf"\b{name}\b", text)), None)

    def _leave_out(self, name: str) -> None:
        with self._lock:
            if name not in self._refused:
                self._refused.add(name)
                self.say(f"warning: {self.where}: the endpoint refuses {name}; it is left out of every request")

    def _without_key(self, message: str) -> str:
        return message.replace(self._key, "***") if self._key else message


def _seconds(value: str | None) -> float | None:
    try:
        return max(0.0, float(value)) if value else None
    except ValueError:
        return None


def _content_or_failure(response: httpx.Response) -> str:
    if response.status_code == 429 or response.status_code >= 500:
        raise _Transient(f"status {response.status_code}", _seconds(response.headers.get("retry-after")))
    if response.status_code != 200:
        raise ChatFailure(f"status {response.status_code}: {response.text[:200]}")
    return _content(response)


def _content(response: httpx.Response) -> str:
    """The text of the first choice. Raises ChatFailure for anything that is not a finished, non-empty answer."""
    try:
        choice = response.json()["choices"][0]
        content = choice["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise ChatFailure(f"not a chat completion: {response.text[:200]}") from None
    if not isinstance(content, str) or not content.strip():
        thinks = any(choice["message"].get(name) for name in ("reasoning_content", "reasoning"))
        raise ChatFailure("thoughts without an answer" if thinks else "an empty answer", answered=True)
    if choice.get("finish_reason") == "length":
        raise ChatFailure("the answer was cut off at the token limit", answered=True)
    answer = THOUGHTS.sub("", content)
    if "</think>" in answer:  # the chat template began the thoughts, so that the answer has only their end
        answer = answer.rpartition("</think>")[2]
    if not answer.strip():
        raise ChatFailure("thoughts without an answer", answered=True)
    return answer
