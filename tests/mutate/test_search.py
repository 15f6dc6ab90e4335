"""The search is deterministic, resumes to the same bytes, and all that it accepts passes an independent look."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from pydantic import ValidationError

from kvopt.config.mutations import MutationsConfig, NoGenerator
from kvopt.errors import InputError
from kvopt.mutate.mutation import Mutation, counts_by_reason, read_mutations
from kvopt.mutate.proposals import Proposal, Request
from kvopt.mutate.search import accepted, mutate, summary
from kvopt.mutate.validity import Rejection
from kvopt.task.template import Slot, Template, parse, unparse
from tests.mutate.test_operators import templates

TEMPLATE = Template.from_messages(
    [
        {
            "role": "system",
            "content": "You are a clerk. Read the user's note and answer with one word. "
            'Do not add "any text".\n\nRules:\n'
            "- Use {braces} as they are.\n- Return NONE if the note is empty.\n- Never guess; don't explain.\n",
        },
        {"role": "user", "content": "Note: {{note}}\nLabel:"},
    ]
)
RULES = ("structure", "syntax", "lexical")


def config(**changes: object) -> MutationsConfig:
    return MutationsConfig(**{"count": 12, "operators": RULES, "generator": NoGenerator(), **changes})  # type: ignore[arg-type]


def ids(template: Template) -> tuple[int, ...]:
    return tuple("".join(template.fields).encode())


class Paraphraser:
    """Adds a word for each turn; fails or breaks a slot now and then."""

    name = "fake"
    family = "paraphrase"
    limit = None

    def __init__(self, batch: int = 1, fails: bool = False) -> None:
        self.batch, self.fails, self.asked = batch, fails, 0

    def propose(self, requests: list[Request]) -> list[Proposal]:
        self.asked += len(requests)
        return [self._one(request) for request in requests]

    def _one(self, request: Request) -> Proposal:
        if self.fails or request.turn % 4 == 3:
            return Proposal(rejection=Rejection("generation-failed", "status 500"))
        first, second = request.template.fields
        if request.turn % 4 == 2:
            return Proposal(request.template.with_fields([first, "Note."]))
        return Proposal(
            request.template.with_fields([f"Paraphrase {'x' * request.turn}y: " + first, second]), detail="fake"
        )


def test_same_seed_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        mutate(TEMPLATE, config(), seed=seed, journal=tmp_path / name, token_ids=ids)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_cut_at_every_line_and_in_the_middle_of_each_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    settings_ = config(operators=(*RULES, "paraphrase"), count=10)
    whole = mutate(
        TEMPLATE, settings_, seed=3, journal=tmp_path / "whole", token_ids=ids, generator=Paraphraser(batch=3)
    )
    data = (tmp_path / "whole").read_bytes()
    assert len(accepted(whole)) == 10
    assert {m.family for m in whole} == {*RULES, "paraphrase"}
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    cuts = sorted({0, 1, *ends, *(end - 1 for end in ends), *((a + b) // 2 for a, b in itertools.pairwise([0, *ends]))})
    for cut in cuts:
        path = tmp_path / "cut"
        path.write_bytes(data[:cut])
        again = mutate(TEMPLATE, settings_, seed=3, journal=path, token_ids=ids, generator=Paraphraser())
        assert path.read_bytes() == data, cut
        assert again == whole


def test_finished_work_is_not_done_again_and_more_can_be_wanted(tmp_path: Path) -> None:
    path, generator = tmp_path / "m.jsonl", Paraphraser()
    both = config(operators=(*RULES, "paraphrase"), count=8)
    mutate(TEMPLATE, both, journal=path, generator=generator)
    asked, data = generator.asked, path.read_bytes()
    mutate(TEMPLATE, both, journal=path, generator=generator)
    assert generator.asked == asked
    mutate(TEMPLATE, both.model_copy(update={"count": 14}), journal=path, generator=generator)
    assert path.read_bytes().startswith(data)
    mutate(TEMPLATE, both, journal=path, generator=generator)
    assert path.read_bytes() == data


def test_a_journal_of_another_search_starts_over(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    mutate(TEMPLATE, config(), seed=1, journal=path)
    mutate(TEMPLATE, config(), seed=2, journal=path)
    mutate(TEMPLATE, config(), seed=2, journal=tmp_path / "fresh")
    assert path.read_bytes() == (tmp_path / "fresh").read_bytes()


def test_damage_before_the_last_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    mutate(TEMPLATE, config(), journal=path)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], b"{", *lines[2:]]))
    with pytest.raises(InputError, match="jsonl:2: the line is damaged"):
        mutate(TEMPLATE, config(), journal=path)


def test_records_round_trip(tmp_path: Path) -> None:
    made = mutate(TEMPLATE, config(), journal=tmp_path / "m.jsonl")
    assert [Mutation.from_json(json.loads(json.dumps(m.to_json()))) for m in made] == made
    assert read_mutations(tmp_path / "m.jsonl") == made


def test_names_ids_and_lineage(tmp_path: Path) -> None:
    made = accepted(mutate(TEMPLATE, config(count=60), journal=tmp_path / "m.jsonl", token_ids=ids))
    assert [m.name for m in made] == [f"m{i:03d}" for i in range(1, 61)]
    assert len({m.id for m in made}) == len({ids(m.template) for m in made if m.template}) == 60
    earlier: dict[str, Mutation] = {}
    for m in made:
        assert all(parent in earlier for parent in m.lineage)
        assert not m.lineage or earlier[m.lineage[-1]].lineage == m.lineage[:-1]
        earlier[m.id] = m
    assert any(m.lineage for m in made)
    assert {m.family for m in made} == set(RULES)
    assert any(len(m.operators) > 3 for m in made)


def test_it_stops_with_fewer_and_says_why(tmp_path: Path) -> None:
    few = config(count=30, operators=("bullet-mark",), max_attempts=40)
    made = mutate(TEMPLATE, few, journal=tmp_path / "m.jsonl")
    counts = counts_by_reason(made)
    assert sum(counts.values()) == len(made) == 40
    assert 0 < counts["accepted"] < 30
    assert "30 were wanted, but all 40 attempts were used" in summary(made, few)


def test_a_failed_generation_is_recorded_and_never_a_candidate(tmp_path: Path) -> None:
    both = config(operators=("paraphrase",), count=5)
    made = mutate(TEMPLATE, both, journal=tmp_path / "m.jsonl", generator=Paraphraser(fails=True))
    assert [m.reason for m in made] == ["generation-failed"] * 5  # then it gives up
    assert all(m.template is None and not m.accepted for m in made)
    assert "the generator failed" in summary(made, both)
    mixed = mutate(
        TEMPLATE, config(operators=("paraphrase", "lexical")), journal=tmp_path / "n", generator=Paraphraser(fails=True)
    )
    assert len(accepted(mixed)) == 12
    assert counts_by_reason(mixed)["generation-failed"] == 5


def test_progress_sees_every_attempt_those_of_the_journal_too(tmp_path: Path) -> None:
    seen: list[Mutation] = []
    mutate(TEMPLATE, config(), journal=tmp_path / "m.jsonl")
    made = mutate(TEMPLATE, config(), journal=tmp_path / "m.jsonl", progress=seen.append)
    assert seen == made


def test_count_zero_makes_nothing(tmp_path: Path) -> None:
    assert mutate(TEMPLATE, config(count=0), journal=tmp_path / "m.jsonl") == []


def contents(rendered: str | list[dict[str, str]]) -> str:
    return rendered if isinstance(rendered, str) else "\n\n".join(message["content"] for message in rendered)


def leading_static(template: Template) -> list[str]:
    """What ``scope: leading`` lets change: each field's source before the first slot ("" for fields after it)."""
    leading, seen = [], False
    for field in template.fields:
        parts = parse(field)
        slot = next((i for i, part in enumerate(parts) if isinstance(part, Slot)), None)
        leading.append("" if seen else unparse(parts[:slot]))
        seen = seen or slot is not None
    return leading


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(templates())
def test_whatever_is_accepted_passes_an_independent_look(tmp_path: Path, template: Template) -> None:
    path = tmp_path / "m.jsonl"
    path.unlink(missing_ok=True)
    made = accepted(mutate(template, config(count=6, max_attempts=12), journal=path, token_ids=ids))
    values = {name: f"<<{i}>>" for i, name in enumerate(template.slots)}
    before = contents(template.fill(values))
    tail = "".join(template.fields)[len("".join(leading_static(template))) :]
    texts = set()
    for m in made:
        assert m.template is not None
        after = contents(m.template.fill(values))
        assert all(after.count(v) == before.count(v) for v in values.values())
        assert m.template.slot_sequence == template.slot_sequence
        assert "".join(m.template.fields).endswith(tail[tail.find("{{") :] if tail.startswith("{{") else "")
        for pattern in (r"`[^`\n]+`", r"https?://\S+\w", r"[{}$%]"):
            assert Counter(re.findall(pattern, after)) == Counter(re.findall(pattern, before))
        texts.add(m.template.fields)
    assert len(texts) == len(made)
    assert template.fields not in texts


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"operators": ["structur"]}, "did you mean 'structure'"),
        ({"operators": []}, "no operators"),
        ({"protect": ["re:("]}, "not a regular expression"),
        ({"counts": 3}, "counts"),
        ({"generator": {"kind": "endpoint", "model": "m"}}, "base_url"),
        ({"generator": {"kind": "local", "url": "x"}}, "url"),
        ({"generator": {"kind": "endpoint", "base_url": "ftp://x", "model": "m"}}, "http"),
    ],
)
def test_config_mistakes_are_named(bad: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        MutationsConfig(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        lambda line: line["template"]["messages"][1].update(content="Note: {{nope}}\nLabel:"),
        lambda line: line["template"]["messages"][0].update(content="Something else."),
        lambda line: line.update(template=None),
        lambda line: line.update(name=None),
        lambda line: line.update(id="0123456789ab"),
    ],
)
def test_a_wording_that_was_changed_in_the_journal_is_refused(tmp_path: Path, change: Callable[[Any], object]) -> None:
    """It would be scored and exported under the name of another, with slots that nothing fills."""
    mutate(TEMPLATE, config(count=2), journal=tmp_path / "m.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line["accepted"])
    change(first)
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, lines[-1]]))
    with pytest.raises(InputError, match=r"m\.jsonl:\d+: the line is damaged"):
        read_mutations(tmp_path / "m.jsonl")
