"""kvopt check-endpoint: one question for each endpoint, and what is said of the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvopt.config.document import load_config
from kvopt.run.endpoint_check import EndpointAnswer, check_endpoints
from kvopt.run.inputs import read_inputs
from tests.jobs import write_job

URL = "http://models.test/v1"


def checked(folder: Path, replies: dict[str, str], status: int = 200) -> list[EndpointAnswer]:
    """The check of a job with all three kinds of endpoint; ``replies`` by model."""

    def handle(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        content = replies[body["model"]]
        if content == "echo":
            content = "Kindly " + body["messages"][-1]["content"].split("\n\n", 1)[1]
        if status == 200 and "temperature" in body and body["model"] == "judge":
            return httpx.Response(400, text="temperature is not supported")
        choice = {"message": {"content": content}, "finish_reason": "stop"}
        return httpx.Response(
            status, json={"choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 3}}
        )

    def at(kind: str, model: str) -> str:
        return json.dumps({"kind": kind, "base_url": URL, "model": model, "retries": 0})

    config = write_job(folder)
    sets = [
        f"mutations.generator={at('endpoint', 'writer')}",
        f"mutations.check={at('judge', 'eye')}",
        f"evaluate.metrics=[{at('judge', 'judge')}]",
    ]
    return check_endpoints(read_inputs(*load_config(config, sets)), httpx.MockTransport(handle))


def test_each_endpoint_is_asked_as_kvopt_asks_it(tmp_path: Path) -> None:
    writer, eye, judge = checked(tmp_path, {"writer": "echo", "eye": '{"same": true}', "judge": "**5**"})
    assert (writer.where, writer.model, writer.fault) == ("mutations.generator", "writer", None)
    assert writer.answer.startswith("Kindly")
    assert (eye.where, eye.fault, eye.answer) == ("mutations.check", None, "the template means the same as itself")
    assert (eye.tokens_in, eye.tokens_out) == (20, 6), "asked both ways"
    assert (judge.fault, judge.answer) == (None, "a gold output gets 5, on 1 to 5")
    assert (judge.tokens_in, judge.tokens_out) == (10, 3)
    assert judge.said == (f"warning: {judge.where}: the endpoint refuses temperature; it is left out of every request",)
    assert all(one.seconds >= 0 for one in (writer, eye, judge))


@pytest.mark.parametrize(
    ("replies", "faults"),
    [
        (
            {"writer": "", "eye": '{"same": false, "difference": "tone"}', "judge": "1"},
            ["generation-failed: an empty answer", "different from itself: tone", "a gold output 1, on 1 to 5"],
        ),
        (
            {"writer": "<think>hm", "eye": "perhaps", "judge": "good"},
            ["thoughts without an answer", "states no verdict", "not a number from 1 to 5"],
        ),
    ],
)
def test_answers_that_cannot_be_used_are_faults(replies: dict[str, str], faults: list[str], tmp_path: Path) -> None:
    found = checked(tmp_path, replies)
    assert [one.answer for one in found][:2] == ["", ""]
    for one, fault in zip(found, faults, strict=True):
        assert one.fault is not None
        assert fault in one.fault


def test_an_endpoint_that_is_not_there_is_a_fault(tmp_path: Path) -> None:
    found: list[Any] = checked(tmp_path, {"writer": "x", "eye": "x", "judge": "5"}, status=404)
    assert all("status 404" in one.fault for one in found)
