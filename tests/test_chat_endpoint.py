"""The client of a chat endpoint: how often it tries (its answers and failures: tests/mutate/test_generators.py)."""

from __future__ import annotations

import contextlib

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
