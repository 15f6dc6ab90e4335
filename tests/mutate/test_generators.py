"""Paraphrasers: an endpoint on this machine, a made-up local model, files."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from kvopt.config.mutations import EndpointGenerator, MutationsConfig, NoGenerator
from kvopt.errors import InputError, KvoptError
from kvopt.mutate.generators import build_generator
from kvopt.mutate.generators.endpoint import EndpointParaphraser
from kvopt.mutate.generators.file import FileVariants
from kvopt.mutate.generators.local import LocalParaphraser
from kvopt.mutate.mutation import Mutation, read_mutations
from kvopt.mutate.proposals import Proposal, Request, marked
from kvopt.mutate.search import accepted, mutate
from kvopt.mutate.spans import mask
from kvopt.task.template import Template

SYSTEM = 'Read the note and answer with "one word" in JSON. Never add a comment to {"a": 1}.'
TEMPLATE = Template.from_messages(
    [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Note: {{note}}"}]
)
KEY = "sk-secret-7351"
Answer = tuple[int, dict[str, str], bytes]


def request(turn: int = 0, template: Template = TEMPLATE) -> Request:
    return Request(template, "leading", (), seed=turn, run_seed=0, turn=turn)


def chat(content: Any, finish: str = "stop") -> Answer:
    return 200, {}, json.dumps({"choices": [{"message": {"content": content}, "finish_reason": finish}]}).encode()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[str, list[dict[str, Any]]]]]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    servers: list[ThreadingHTTPServer] = []

    def start(answers: Callable[[int, dict[str, Any]], Answer]) -> tuple[str, list[dict[str, Any]]]:
        calls: list[dict[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                calls.append({"path": self.path, "key": self.headers.get("authorization"), **body})
                status, headers, data = answers(len(calls), body)
                self.send_response(status)
                for name, value in {**headers, "content-length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1", calls

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def endpoint(url: str, **changes: Any) -> EndpointParaphraser:
    return EndpointParaphraser(
        EndpointGenerator(kind="endpoint", base_url=url, model="m", **{"retries": 2, "timeout": 5, **changes}),
        first_wait=0.01,
    )


def rewritten(_: int, body: dict[str, Any]) -> Answer:
    text = body["messages"][-1]["content"].split("\n\n", 1)[1]
    return chat(text.replace("Read the note", "Look at the note"))


def reason(proposal: Proposal) -> str:
    assert proposal.template is None
    assert proposal.rejection is not None
    return proposal.rejection.reason


def test_endpoint_sees_markers_and_its_answer_gets_the_literals_back(serve: Any) -> None:
    url, calls = serve(rewritten)
    [proposal] = endpoint(url).propose([request()])
    assert proposal.template is not None
    assert proposal.template.fields == (SYSTEM.replace("Read the note", "Look at the note"), "Note: {{note}}")
    sent = calls[0]["messages"][-1]["content"]
    assert calls[0]["path"] == "/v1/chat/completions"
    assert len(calls) == 1
    assert "[K1]" in sent
    assert not any(literal in sent for literal in ("one word", "JSON", '{"a"', "{{note}}"))


def test_endpoint_waits_and_asks_again_after_429_and_500(serve: Any) -> None:
    url, calls = serve(
        lambda n, body: (
            (429, {"Retry-After": "0.05"}, b"") if n == 1 else (503, {}, b"") if n == 2 else rewritten(n, body)
        )
    )
    [proposal] = endpoint(url).propose([request()])
    assert proposal.template is not None
    assert len(calls) == 3


def test_an_endpoint_without_a_system_role_is_asked_in_the_user_s_message_alone(serve: Any) -> None:
    def only_user(n: int, body: dict[str, Any]) -> Answer:
        if body["messages"][0]["role"] == "system":
            return 400, {}, b'{"object": "error", "message": "System role not supported"}'
        instructions, way, text = body["messages"][0]["content"].split("\n\n", 2)
        assert instructions.startswith("You rewrite the instructions")
        assert way.startswith("Rewrite it")
        return chat(text.replace("Read the note", "Look at the note"))

    url, calls = serve(only_user)
    said: list[str] = []
    settings = EndpointGenerator(kind="endpoint", base_url=url, model="m", retries=2, timeout=5, concurrency=1)
    proposals = EndpointParaphraser(settings, first_wait=0.01, say=said.append).propose([request(0), request(1)])
    assert all(proposal.template is not None for proposal in proposals)
    assert len(calls) == 3, "a system message was tried once"
    [line] = said
    assert line.startswith("warning: mutations.generator: the endpoint refuses system messages")


def test_an_endpoint_that_always_fails_is_a_failure_not_a_candidate(serve: Any, tmp_path: Path) -> None:
    url, calls = serve(lambda n, body: (500, {}, b"oops"))
    generator = endpoint(url)
    [proposal] = generator.propose([request()])
    assert reason(proposal) == "request-failed"
    assert len(calls) == 3
    with pytest.raises(
        KvoptError, match=r"answered none of the last 5 requests: status 500; 0 accepted mutations of 2"
    ):
        mutate(
            TEMPLATE, MutationsConfig(count=2, operators=("paraphrase",)), journal=tmp_path / "m", generator=generator
        )
    assert read_mutations(tmp_path / "m") == []


VERBS = ("Study", "Check", "View", "Consider", "Review", "Examine", "Inspect", "Look at", "Go over", "Take")


def differently(n: int, body: dict[str, Any]) -> Answer:
    """Another rewording for each seed."""
    text = body["messages"][-1]["content"].split("\n\n", 1)[1]
    return chat(text.replace("Read", VERBS[body["seed"] % len(VERBS)]))


WANTED = MutationsConfig(count=4, operators=("paraphrase",), max_attempts=20)


def searched(journal: Path, generator: EndpointParaphraser, config: MutationsConfig = WANTED) -> list[Mutation]:
    made = mutate(TEMPLATE, config, journal=journal, generator=generator)
    assert made == read_mutations(journal)
    return made


def test_what_an_endpoint_did_not_answer_is_asked_again_with_the_same_requests(serve: Any, tmp_path: Path) -> None:
    up, asked = serve(differently)
    wanted = searched(tmp_path / "whole", endpoint(up, concurrency=1))
    down, refused = serve(lambda n, body: (503, {}, b""))
    with pytest.raises(KvoptError, match="status 503"):
        searched(tmp_path / "m", endpoint(down, concurrency=1, retries=0))
    assert searched(tmp_path / "m", endpoint(up, concurrency=2, timeout=60)) == wanted
    again = sorted(call["seed"] for call in asked[len(wanted) :])
    assert again == sorted(call["seed"] for call in refused[: len(again)])


def test_a_request_that_fails_in_the_middle_loses_nothing_and_takes_a_name_of_its_own(
    serve: Any, tmp_path: Path
) -> None:
    url, calls = serve(lambda n, body: (503, {}, b"") if n == 2 else differently(n, body))
    first = searched(tmp_path / "m", endpoint(url, concurrency=1, retries=0))
    assert first[1].reason == "request-failed"
    assert len(accepted(first)) == 4
    paid = len(calls)
    assert searched(tmp_path / "m", endpoint(url, concurrency=1, retries=0)) == first
    assert len(calls) == paid  # all that was wanted is there
    more = searched(tmp_path / "m", endpoint(url, concurrency=1), WANTED.model_copy(update={"count": 5}))
    assert more[1].reason != "request-failed"
    assert [m for m in more if m.attempt != 1][: len(first) - 1] == [m for m in first if m.attempt != 1]
    names = [m.name for m in accepted(more)]
    assert sorted(names) == ["m001", "m002", "m003", "m004", "m005"]
    assert len({m.id for m in accepted(more)}) == 5


def test_an_endpoint_that_answers_now_and_then_does_not_end_the_search(serve: Any, tmp_path: Path) -> None:
    url, _ = serve(lambda n, body: differently(n, body) if n % 5 == 0 else (500, {}, b""))
    made = searched(tmp_path / "m", endpoint(url, concurrency=1, retries=0))
    assert len(made) == 20
    assert 0 < len(accepted(made)) < 4


def test_a_search_whose_every_request_failed_is_an_error_however_few_they_are(serve: Any, tmp_path: Path) -> None:
    url, _ = serve(lambda n, body: (401, {}, b"no such key"))
    few = WANTED.model_copy(update={"max_attempts": 2})
    with pytest.raises(KvoptError, match="last 2 requests: status 401: no such key"):
        searched(tmp_path / "m", endpoint(url), few)


def test_how_an_endpoint_is_asked_is_in_no_key_and_what_it_is_asked_is() -> None:
    settings = {"kind": "endpoint", "base_url": "http://a/v1", "model": "m"}
    identity = MutationsConfig(generator=settings).identity()
    for name, value in [
        ("base_url", "http://b/v1"), ("timeout", 5), ("retries", 0), ("concurrency", 9), ("api_key_env", "KEY"),
    ]:  # fmt: skip
        assert MutationsConfig(generator=settings | {name: value}).identity() == identity
    for name, value in [("model", "n"), ("temperature", 0.5)]:
        assert MutationsConfig(generator=settings | {name: value}).identity() != identity


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ((200, {}, b"{not json"), "request-failed"),
        ((200, {}, b'{"choices": []}'), "request-failed"),
        ((200, {}, b'{"error": "x"}'), "request-failed"),
        ((400, {}, b"bad"), "request-failed"),
        (chat(""), "generation-failed"),
        (chat(None), "generation-failed"),
        (chat("Look at the note [K1] [K2] [K3]", "length"), "generation-failed"),
        (chat('Look at the note and answer with "[K1]". Never add a comment to [K3].'), "lost-marker"),
        (
            chat('Look at the note and answer with "[K1]" in [K2]. Never add [K2] a comment to [K3].'),
            "duplicated-marker",
        ),
        (chat('Look at the note and answer with "[K1]" in [K2]. Never add a [K4] comment to [K3].'), "invented-marker"),
        (chat('Look at the note, answer with "[K1]" in [K2]. Add a comment to [K3].'), "sanity-negation"),
        (
            chat('Here is the text: Look at the note, answer with "[K1]" in [K2]. Never comment on [K3].'),
            "sanity-chatter",
        ),
    ],
)
def test_a_bad_answer_is_refused_with_its_reason(serve: Any, answer: Answer, expected: str) -> None:
    url, calls = serve(lambda n, body: answer)
    assert reason(endpoint(url).propose([request()])[0]) == expected
    assert len(calls) == 1


def test_an_endpoint_that_is_not_there_is_a_failure() -> None:
    assert reason(endpoint("http://127.0.0.1:9", retries=1).propose([request()])[0]) == "request-failed"


def test_the_key_is_sent_and_never_shown(
    serve: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    url, calls = serve(lambda n, body: (401, {}, f"bad key {KEY}".encode()))
    generator = endpoint(url, api_key_env="MY_KEY")
    with caplog.at_level(logging.DEBUG), pytest.raises(KvoptError, match=r"bad key \*\*\*"):
        mutate(
            TEMPLATE, MutationsConfig(count=1, operators=("paraphrase",)), journal=tmp_path / "m", generator=generator
        )
    assert calls[0]["key"] == f"Bearer {KEY}"
    assert KEY not in caplog.text + repr(generator) + (tmp_path / "m").read_text()
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(InputError, match="MY_KEY is not set"):
        endpoint(url, api_key_env="MY_KEY")


def fake_model(prompts: list[list[dict[str, str]]], seed: int, max_tokens: int, temperature: float) -> list[str]:
    """Some good and some bad rewrites of the last message."""
    text = prompts[0][-1]["content"].removeprefix("Rewrite: ")
    good = text.replace("Read the note", "Look at the note").replace("Never add a comment", "Never put a comment")
    return [good, "Sure! " + good, text.replace("[K1]", "it"), text, good + " good " * 30, ""][: len(prompts)]


def test_local_paraphrases_keep_good_rewrites_only() -> None:
    generator = LocalParaphraser(fake_model, samples=6)
    fields = {p.template.fields[0] for turn in range(12) if (p := generator.propose([request(turn)])[0]).template}
    first, second = SYSTEM.split(" Never")
    good, better = (
        first.replace("Read the note", "Look at the note"),
        " Never" + second.replace("add a comment", "put a comment"),
    )
    assert fields == {good + " Never" + second, first + better, good + better}


def test_local_does_not_depend_on_what_was_asked_before() -> None:
    alone = LocalParaphraser(fake_model).propose([request(5)])
    used = LocalParaphraser(fake_model)
    used.propose([request(i) for i in range(5)])
    assert used.propose([request(5)]) == alone


def test_local_without_a_good_rewrite_is_refused() -> None:
    generator = LocalParaphraser(lambda prompts, *_: ["Here is it."] * len(prompts))
    proposal = generator.propose([request()])[0]
    assert reason(proposal) in {"lost-marker", "sanity-length"}


def test_markers_do_not_clash_with_the_text() -> None:
    source = "Use [K1], [K2] as `x` in 3 lines."
    field = mask(source, len(source))
    form = marked(field.text)
    restored = form.restore(form.text)
    assert isinstance(restored, str)
    assert field.unmask(restored) == source
    assert not any(literal in form.text.replace("[K", "") for literal in ("`x`",))


def test_file_variants_are_taken_in_order_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    good = SYSTEM.replace("Read", "Look at")
    rows = [
        {"text": good},
        {"text": good.replace("JSON", "XML")},
        {"messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Note:"}]},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    config = MutationsConfig(count=9, operators=("paraphrase",))
    made = mutate(TEMPLATE, config, journal=tmp_path / "m", generator=FileVariants(path, TEMPLATE))
    assert [m.reason for m in made] == [None, "changed-literal", "lost-slot"]
    assert accepted(made)[0].template == TEMPLATE.with_fields([good, "Note: {{note}}"])


def test_text_files_and_folders_of_variants(tmp_path: Path) -> None:
    original = Template.from_text("Read {{x}} now.")
    (tmp_path / "v.txt").write_text("Look at {{x}} now.\n---\nSee {{x}} now.\n")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "1.txt").write_text("Study {{x}} now.\n")
    for name, expected in [("v.txt", ["Look at {{x}} now.", "See {{x}} now."]), ("d", ["Study {{x}} now."])]:
        generator = FileVariants(tmp_path / name, original)
        proposals = generator.propose([request(i, original) for i in range(generator.limit or 0)])
        assert [p.template.text for p in proposals if p.template] == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "Read \\ud800 {{note}}"}', "v.jsonl:1: .*half of a surrogate pair"),
        ("[" * 100_000, "v.jsonl:1: not JSON: nested too deeply"),
        ("{", "v.jsonl:1: not JSON"),
        ("3", "no template"),
        ('{"messages": []}', "other messages"),
        ("", "no variants"),
    ],
)
def test_broken_variant_files_are_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "v.jsonl").write_text(line)
    with pytest.raises(InputError, match=message):
        FileVariants(tmp_path / "v.jsonl", TEMPLATE)


def test_build_generator_follows_the_config(tmp_path: Path) -> None:
    local = MutationsConfig().generator
    assert isinstance(build_generator(local, TEMPLATE, complete=fake_model), LocalParaphraser)
    assert build_generator(NoGenerator(), TEMPLATE) is None
    with pytest.raises(InputError, match="needs a base model"):
        build_generator(local, TEMPLATE)
