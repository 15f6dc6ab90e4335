"""A judge as the second eye on paraphrases: what it is shown, how it is read, what becomes of its verdicts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from kvopt.config.mutations import MeaningCheck, MutationsConfig
from kvopt.errors import KvoptError
from kvopt.mutate.generators.file import FileVariants
from kvopt.mutate.meaning import MeaningJudge, read_verdict
from kvopt.mutate.mutation import read_mutations
from kvopt.mutate.search import mutate, summary
from kvopt.task.template import Template

ORIGINAL = Template.from_text("Answer with the name of the city alone. Write it in capitals.\n{{text}}")
SAME = "Give only the city's name, in capitals.\n{{text}}"
DROPPED = "Give only the city's name, please.\n{{text}}"
URL = "http://judge.test/v1"


def judge(answer: Callable[[str, str], str | int], asked: list[dict] | None = None, **more: str) -> MeaningJudge:
    """A judge whose replies are ``answer(A, B)``: text, or a status."""

    def handle(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if asked is not None:
            asked.append(body)
        question = body["messages"][-1]["content"]
        first, second = question.split("</A>")[0], question.split("</A>")[1]
        said = answer(first, second)
        if isinstance(said, int):
            return httpx.Response(said)
        choice = {"message": {"content": said}, "finish_reason": "stop"}
        return httpx.Response(200, json={"choices": [choice]})

    config = MeaningCheck(kind="judge", base_url=URL, model="m", retries=0, **more)  # type: ignore[arg-type]
    return MeaningJudge(config, httpx.MockTransport(handle))


def honest(first: str, second: str) -> str:
    capitals = ["capitals" in text for text in (first, second)]
    if capitals[0] == capitals[1]:
        return '{"same": true, "difference": ""}'
    return '{"same": false, "difference": "one asks for capitals"}'


@pytest.mark.parametrize(
    ("reply", "same", "reason"),
    [
        ('{"same": true, "difference": ""}', True, ""),
        ('{"same": false, "difference": "B drops a rule"}', False, "B drops a rule"),
        ('```json\n{"same": false, "difference": "x"}\n```', False, "x"),
        ('I compare. {"same": false} ... Correction: {"same": true, "difference": ""}', True, ""),
        ("Yes, they do.", True, "they do"),
        ("**No**: B asks for prose.", False, "** B asks for prose"),
        ("different", False, ""),
    ],
)
def test_a_verdict_is_read_from_json_thoughts_fences_and_plain_words(reply: str, same: bool, reason: str) -> None:
    opinion = read_verdict(reply)
    assert opinion.same is same
    assert opinion.reason.lstrip("*: ") == reason.lstrip("*: ")


@pytest.mark.parametrize("reply", ["", "Hm, hard to say.", '{"same": "maybe"}', "{same: true}"])
def test_a_reply_without_a_verdict_is_none(reply: str) -> None:
    opinion = read_verdict(reply)
    assert opinion.same is None
    assert "states no verdict" in opinion.reason


def test_both_ways_are_asked_with_both_texts_as_material() -> None:
    asked: list[dict] = []
    chat = Template.from_messages([{"role": "system", "content": "Be short."}, {"role": "user", "content": "{{text}}"}])
    assert judge(honest, asked)(chat, chat).same is True
    questions = {body["messages"][-1]["content"] for body in asked}
    assert len(asked) == 2
    assert questions == {
        "<A>\n[system]\nBe short.\n\n[user]\n{{text}}\n</A>\n<B>\n[system]\nBe short.\n\n[user]\n{{text}}\n</B>"
    }
    assert {body["temperature"] for body in asked} == {0.0}
    asked.clear()
    judge(honest, asked)(ORIGINAL, Template.from_text(SAME))
    firsts = {body["messages"][-1]["content"].split("</A>")[0] for body in asked}
    assert len(firsts) == 2, "each text once in front"


def test_a_judge_that_contradicts_itself_finds_a_difference() -> None:
    by_place = judge(lambda first, second: json.dumps({"same": "capitals" in first}))
    assert by_place(ORIGINAL, Template.from_text(DROPPED)).same is False


def made(tmp_path: Path, check: MeaningJudge, **settings: str):
    (tmp_path / "pool.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in (SAME, DROPPED)))
    config = MutationsConfig(count=2, operators=("paraphrase",), check=check.config.model_copy(update=settings))
    generator = FileVariants(tmp_path / "pool.jsonl", ORIGINAL)
    journal = tmp_path / "mutations.jsonl"
    return mutate(ORIGINAL, config, journal=journal, generator=generator, meaning=check), config, journal


def test_a_wording_that_asks_for_something_else_is_rejected_with_the_reason(tmp_path: Path) -> None:
    tried, config, journal = made(tmp_path, judge(honest))
    assert [(m.accepted, m.reason, m.detail) for m in tried][1] == (False, "meaning", "one asks for capitals")
    assert tried[0].accepted
    assert [m.check for m in read_mutations(journal)] == [
        {"same": True, "reason": ""},
        {"same": False, "reason": "one asks for capitals"},
    ]
    assert "meaning 1" in summary(tried, config)


def test_or_it_is_accepted_with_a_flag(tmp_path: Path) -> None:
    tried, config, journal = made(tmp_path, judge(honest), faults="flag")
    assert [m.accepted for m in tried] == [True, True]
    assert read_mutations(journal)[1].check == {"same": False, "reason": "one asks for capitals"}
    assert "1 of the accepted ask for something else" in summary(tried, config)


def test_a_reply_that_cannot_be_read_is_a_rejection_of_its_own(tmp_path: Path) -> None:
    tried, _, _ = made(tmp_path, judge(lambda first, second: "I like both."))
    assert {m.reason for m in tried} == {"meaning-unread"}


def test_a_judge_that_does_not_answer_ends_the_search_and_is_asked_again(tmp_path: Path) -> None:
    with pytest.raises(KvoptError, match=r"mutations\.check: the endpoint answered none"):
        made(tmp_path, judge(lambda first, second: 503))
    tried, _, _ = made(tmp_path, judge(honest))
    assert [m.reason for m in tried] == [None, "meaning"]


def test_mutations_without_a_check_are_what_they_were() -> None:
    assert "check" not in MutationsConfig(count=2).identity()
    with_check = MutationsConfig(count=2, check=MeaningCheck(kind="judge", base_url=URL, model="m"))
    assert with_check.identity()["check"] == {"model": "m", "temperature": 0.0, "kind": "judge", "faults": "reject"}
