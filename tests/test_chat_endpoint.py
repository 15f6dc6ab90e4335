"""The client of a chat endpoint: how often it tries, and models without a system role (its answers and failures:
tests/mutate/test_generators.py).
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

import httpx
import pytest

from kvopt.base.chat_endpoint import GIVEN_UP_AFTER, ChatEndpoint, ChatFailure
from kvopt.config.mutations import EndpointSettings


class Server:
    """Counts requests; refuses the connection, or gives a status."""

    def __init__(self, *steps: int | None):
        self.steps, self.asked = list(steps), 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        step = self.steps[min(self.asked, len(self.steps) - 1)]
        self.asked += 1
        if step is None:
            raise httpx.ConnectError("connection refused")
        return httpx.Response(step, json={"choices": [{"message": {"content": "yes"}}]})


def asked_of(server: Server, times: int) -> list[int]:
    """Requests that each question led to."""
    settings = EndpointSettings(base_url="http://localhost/v1", model="m", retries=2)
    endpoint = ChatEndpoint(settings, "here", first_wait=0.001, transport=httpx.MockTransport(server))
    found = []
    with endpoint.client() as client:
        for _ in range(times):
            before = server.asked
            with contextlib.suppress(ChatFailure):
                endpoint.ask(client, [], seed=0)
            found.append(server.asked - before)
    return found


def test_a_server_that_is_not_there_is_soon_given_one_try_a_question():
    assert asked_of(Server(None), 6) == [3] * GIVEN_UP_AFTER + [1] * 3


def test_a_server_that_is_back_is_given_all_tries_again():
    refusals = [None] * 3 * GIVEN_UP_AFTER
    assert asked_of(Server(*refusals, 200, None), GIVEN_UP_AFTER + 2) == [3] * GIVEN_UP_AFTER + [1, 3]


@pytest.mark.parametrize("status", [429, 500])
def test_a_server_that_is_busy_is_given_all_tries_always(status: int):
    assert asked_of(Server(status), 5) == [3] * 5


MESSAGES = [{"role": "system", "content": "Grade it."}, {"role": "user", "content": "An answer."}]
MERGED = [{"role": "user", "content": "Grade it.\n\nAn answer."}]
VLLM = "System role not supported"
LLAMA_CPP = "Jinja Exception: Conversation roles must alternate user/assistant/user/assistant/..."
GATEWAY = '{"error": {"message": "messages: Unexpected role \\"system\\"", "type": "invalid_request_error"}}'
GOOGLE = "Developer instruction is not enabled: a system_instruction cannot be given"


class Roles:
    """A server whose model has some roles; for others it gives ``status`` and ``text``."""

    def __init__(self, roles: tuple[str, ...], status: int, text: str):
        self.roles, self.status, self.text = roles, status, text
        self.asked: list[list[dict[str, Any]]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        messages = json.loads(request.content)["messages"]
        self.asked.append(messages)
        if any(message["role"] not in self.roles for message in messages):
            return httpx.Response(self.status, text=self.text)
        return httpx.Response(200, json={"choices": [{"message": {"content": "4"}, "finish_reason": "stop"}]})


def endpoint_of(server: Roles) -> tuple[ChatEndpoint, list[str]]:
    said: list[str] = []
    settings = EndpointSettings(base_url="http://localhost/v1", model="m", retries=1)
    transport = httpx.MockTransport(server)
    return ChatEndpoint(settings, "here", first_wait=0.001, transport=transport, say=said.append), said


@pytest.mark.parametrize(("status", "text"), [(400, VLLM), (500, LLAMA_CPP), (422, GATEWAY), (400, GOOGLE)])
def test_a_system_message_that_is_refused_goes_in_front_of_the_user_s_which_is_said_once(status: int, text: str):
    server = Roles(("user", "assistant"), status, text)
    endpoint, said = endpoint_of(server)
    with endpoint.client() as client:
        assert [endpoint.ask(client, MESSAGES, seed) for seed in range(3)] == ["4"] * 3
    assert server.asked == [MESSAGES, MERGED, MERGED, MERGED], "refused once, and not tried again"
    assert said == [
        "warning: here: the endpoint refuses system messages; kvopt puts their text in front of the user's message"
    ]


def test_a_model_with_a_system_role_gets_the_message_in_it():
    server = Roles(("system", "user"), 400, VLLM)
    endpoint, said = endpoint_of(server)
    with endpoint.client() as client:
        endpoint.ask(client, MESSAGES, 0)
    assert server.asked == [MESSAGES]
    assert said == []


@pytest.mark.parametrize(
    ("text", "requests"), [("no such model", 1), ("no model for your role", 2), ("a system error", 1)]
)
def test_a_refusal_for_another_reason_stays_the_failure_that_it_is(text: str, requests: int):
    server = Roles((), 400, text)
    endpoint, said = endpoint_of(server)
    with endpoint.client() as client, pytest.raises(ChatFailure, match=f"status 400: {text}"):
        endpoint.ask(client, MESSAGES, 0)
    assert len(server.asked) == requests
    assert said == []


# ---- settings that an endpoint refuses, and thoughts


def answers(body: dict[str, Any], content: str | None, **message: Any) -> httpx.Response:
    choice = {"message": {"content": content, **message}, "finish_reason": "stop"}
    return httpx.Response(200, json={"choices": [choice]})


def endpoint_asked(handle: Any, **settings: Any) -> tuple[ChatEndpoint, list[str], list[dict[str, Any]]]:
    said: list[str] = []
    bodies: list[dict[str, Any]] = []

    def noted(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return handle(bodies[-1])

    config = EndpointSettings(base_url="http://localhost/v1", model="m", retries=0, **settings)
    endpoint = ChatEndpoint(config, "here", first_wait=0.001, transport=httpx.MockTransport(noted), say=said.append)
    return endpoint, said, bodies


@pytest.mark.parametrize("field", ["seed", "temperature", "max_tokens"])
def test_a_setting_that_is_refused_by_name_is_left_out_and_said_once(field: str):
    def handle(body: dict[str, Any]) -> httpx.Response:
        if field in body:
            return httpx.Response(400, text=f"Unsupported parameter: '{field}' is not supported with this model.")
        return answers(body, "yes")

    endpoint, said, bodies = endpoint_asked(handle, max_tokens=9)
    with endpoint.client() as client:
        assert [endpoint.ask(client, MESSAGES, 0) for _ in range(3)] == ["yes"] * 3
    assert [field in body for body in bodies] == [True, False, False, False]
    assert said == [f"warning: here: the endpoint refuses {field}; it is left out of every request"]


def test_settings_are_sent_as_they_are_given_and_null_sends_none():
    endpoint, _, bodies = endpoint_asked(
        lambda body: answers(body, "yes"), temperature=None, send_seed=False, extra_body={"reasoning_effort": "low"}
    )
    with endpoint.client() as client:
        endpoint.ask(client, MESSAGES, 3)
    assert bodies == [{"model": "m", "messages": MESSAGES, "reasoning_effort": "low"}]
    endpoint, _, bodies = endpoint_asked(lambda body: answers(body, "yes"), max_tokens=7)
    with endpoint.client() as client:
        endpoint.ask(client, MESSAGES, 3)
    assert {name: bodies[0][name] for name in ("temperature", "seed", "max_tokens")} == {
        "temperature": 1.0,
        "seed": 3,
        "max_tokens": 7,
    }


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ("<think>hm</think>\n\nyes", "\n\nyes"),
        ("<reasoning>a <b> c</reasoning>yes", "yes"),
        ("begun by the template</think>yes", "yes"),
        ("I <think> so", "I <think> so"),
    ],
)
def test_thoughts_are_no_part_of_the_answer(content: str, answer: str):
    endpoint, _, _ = endpoint_asked(lambda body: answers(body, content))
    with endpoint.client() as client:
        assert endpoint.ask(client, MESSAGES, 0) == answer


@pytest.mark.parametrize(
    ("content", "message"), [("<think>on and on", {}), ("", {"reasoning_content": "hm"}), (None, {"reasoning": "hm"})]
)
def test_thoughts_alone_are_no_answer(content: str | None, message: dict[str, str]):
    endpoint, _, _ = endpoint_asked(lambda body: answers(body, content, **message))
    with endpoint.client() as client, pytest.raises(ChatFailure, match="thoughts without an answer") as caught:
        endpoint.ask(client, MESSAGES, 0)
    assert caught.value.answered


def test_new_settings_change_no_identity_of_what_was_stored():
    plain = EndpointSettings(base_url="http://localhost/v1", model="m")
    assert plain.identity() == {"model": "m", "temperature": 1.0}
    assert EndpointSettings(base_url="http://localhost/v1", model="m", max_tokens=5).identity()["max_tokens"] == 5
