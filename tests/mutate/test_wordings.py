"""Whole wordings from an endpoint: families, distance, several in one call, the accepted ones shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from kvopt.config.document import load_config
from kvopt.config.mutations import WORDING_FAMILIES, EndpointGenerator, MutationsConfig
from kvopt.errors import InputError
from kvopt.mutate.generators import build_generator
from kvopt.mutate.generators.endpoint import EndpointParaphraser
from kvopt.mutate.generators.wordings import WAYS, EndpointWordings, wordings_in
from kvopt.mutate.mutation import Mutation, read_mutations
from kvopt.mutate.orders import text_distance, word_pairs, wordings_report
from kvopt.mutate.search import accepted, mutate
from kvopt.task.template import Template
from tests.jobs import write_job

SYSTEM = "Read the note, then answer with one word. Never add a comment.\n"
TEMPLATE = Template.from_messages(
    [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Note: {{note}}"}]
)
OPENINGS = (
    "Look at the note and", "Given a note,", "Your job: take the note and", "With the note in view,", "Once more:",
    "Here is a note; please", "After the note,", "A note follows, so", "Mind the note and", "By the note,",
)  # fmt: skip


def wording(system: str, user: str = "Note: {{note}}") -> dict[str, Any]:
    return {"messages": [{"role": "system", "content": system}, {"role": "user", "content": user}]}


class Model:
    """A model that writes as many wordings as it is asked for, each once; ``change`` may spoil an answer."""

    def __init__(self, change: Callable[[int, list[Any]], Any] = lambda call, items: json.dumps(items)) -> None:
        self.asked: list[str] = []
        self.change, self.written = change, 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        question = json.loads(request.content)["messages"][-1]["content"]
        self.asked.append(question)
        count = int(question.split("Write ")[1].split(",")[0])
        items = [
            wording(f"{OPENINGS[self.written + i]} answer with one word. Never add a comment.") for i in range(count)
        ]
        self.written += count
        reply = {"choices": [{"message": {"content": self.change(len(self.asked), items)}, "finish_reason": "stop"}]}
        return httpx.Response(200, json=reply | {"usage": {"prompt_tokens": 100, "completion_tokens": 10}})


def writer(model: Model, **settings: Any) -> EndpointWordings:
    given = {"families": ["mood", "style", "shorter"], "at_once": 2, "distance": "far"} | settings
    config = EndpointGenerator(kind="endpoint", base_url="http://host/v1", model="m", retries=0, **given)
    return EndpointWordings(config, first_wait=0.01, transport=httpx.MockTransport(model))


def searched(folder: Path, generator: EndpointWordings, count: int) -> list[Mutation]:
    config = MutationsConfig(count=count, operators=("paraphrase",), max_attempts=12)
    return mutate(TEMPLATE, config, journal=folder / "m.jsonl", generator=generator)


def test_families_take_turns_several_in_one_call_and_accepted_ones_are_shown(tmp_path: Path) -> None:
    model = Model()
    generator = writer(model)
    tried = searched(tmp_path, generator, 5)
    assert [m.accepted for m in tried] == [True] * 5
    assert [m.operators[1] for m in tried] == ["mood", "style", "shorter", "mood", "style"]
    assert tried[0].detail == "mood, far"
    assert len(model.asked) == 3, "two in a call, and no more than are wanted"
    assert [question.count("\n1. ") + question.count("\n2. ") for question in model.asked] == [2, 2, 1]
    assert WAYS["mood"] in model.asked[0]
    assert "Be far from the template" in model.asked[0]
    assert "Wordings that exist" not in model.asked[0]
    for opening in OPENINGS[:4]:
        assert opening in model.asked[2]
    assert OPENINGS[2] not in model.asked[1]
    assert accepted(tried)[0].template is not None
    assert accepted(tried)[0].template.fields[0].endswith("comment.\n"), "the end of the template's message is kept"
    assert generator.chat.usage == {"prompt_tokens": 300, "completion_tokens": 30}


def test_a_search_goes_on_from_its_journal_and_buys_nothing_again(tmp_path: Path) -> None:
    first = Model()
    searched(tmp_path, writer(first), 4)
    second = Model()
    second.written = 6
    tried = searched(tmp_path, writer(second), 5)
    assert len(second.asked) == 1
    assert all(opening in second.asked[0] for opening in OPENINGS[:4])
    assert tried == read_mutations(tmp_path / "m.jsonl")
    assert len(accepted(tried)) == 5


@pytest.mark.parametrize(
    ("spoilt", "reason", "detail"),
    [
        (lambda items: "I would rather not.", "generation-failed", "the answer is no JSON array; 2 were asked for"),
        (lambda items: json.dumps(items[:1]), "generation-failed", "the answer holds 1 wordings; 2 were asked for"),
        (lambda items: json.dumps([items[0], {"messages": [{"role": "user", "content": "Note: {{note}}"}]}]),
         "generation-failed", "other messages than the template's"),
        (lambda items: json.dumps([items[0], wording("Answer with one word about the note.", "Note:")]),
         "lost-slot", "note"),
        (lambda items: json.dumps([items[0], items[0]]), "duplicate", "m001"),
        (lambda items: json.dumps([items[0], wording("Answer \ud800 it.")]), "generation-failed", "surrogates"),
    ],
)  # fmt: skip
def test_what_a_model_spoils_is_rejected_by_name_and_asked_for_again(
    tmp_path: Path, spoilt: Callable[[list[Any]], str], reason: str, detail: str
) -> None:
    model = Model(lambda call, items: spoilt(items) if call == 1 else json.dumps(items))
    tried = searched(tmp_path, writer(model), 2)
    assert len(accepted(tried)) == 2
    rejected = next(m for m in tried if m.attempt == 1)
    assert rejected.reason == reason
    assert detail in (rejected.detail or "")
    assert rejected.operators == ("endpoint", "style")


def test_an_array_is_found_in_a_fence_and_after_thoughts() -> None:
    assert wordings_in('Sure [1]:\n```json\n[{"text": "a [b]"}]\n```') == [{"text": "a [b]"}]
    assert wordings_in('["one", "two"] and more') == ["one", "two"]
    assert wordings_in("[not json") is None


def test_the_report_says_distances_and_the_price(tmp_path: Path) -> None:
    tried = searched(tmp_path, writer(Model()), 3)
    pairs = [word_pairs(m.template) for m in accepted(tried) if m.template is not None]
    first = sorted(text_distance(own, word_pairs(TEMPLATE)) for own in pairs)
    nearest = sorted(min(text_distance(a, b) for b in pairs if b is not a) for a in pairs)
    line = wordings_report(TEMPLATE, tried, {"prompt_tokens": 1200, "completion_tokens": 34})
    assert line is not None
    assert f"from the template {first[1]:.2f} ({first[0]:.2f} to {first[2]:.2f})" in line
    assert f"from the nearest other one {nearest[1]:.2f} ({nearest[0]:.2f} to {nearest[2]:.2f})" in line
    assert line.endswith("bought now: 1,200 tokens in, 34 out")
    assert wordings_report(TEMPLATE, [], {}) is None


def test_families_choose_the_generator_and_stay_out_of_older_identities() -> None:
    plain = {"kind": "endpoint", "base_url": "http://host/v1", "model": "m"}
    whole = EndpointGenerator.model_validate(plain | {"families": "all"})
    assert whole.families == WORDING_FAMILIES == tuple(WAYS)
    assert isinstance(build_generator(whole, TEMPLATE), EndpointWordings)
    older = EndpointGenerator.model_validate(plain)
    assert isinstance(build_generator(older, TEMPLATE), EndpointParaphraser)
    assert not {"families", "distance", "at_once"} & older.identity().keys()
    assert whole.identity() != older.identity()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distance": "far"}, "distance says how wordings of families are asked for; add families: all"),
        ({"families": ["moods"]}, "mood"),
    ],
)
def test_a_setting_that_says_nothing_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    generator = {"kind": "endpoint", "base_url": "http://host/v1", "model": "m"} | settings
    path = write_job(tmp_path, lambda config: config["mutations"].update(generator=generator))
    with pytest.raises(InputError, match=message):
        load_config(path)
