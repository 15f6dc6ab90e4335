"""The base's own answers as gold: only right ones, whole ones, and ones that fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvopt.config.document import load_config
from kvopt.errors import InputError
from kvopt.run.run import Run
from kvopt.train.commands import train_students
from kvopt.train.distill import own_answers as module
from kvopt.train.distill.own_answers import with_own_answers
from kvopt.train.pool import Pool, build_pool, names_of
from tests.jobs import write_job

CHECK = {"kind": "exact-match", "normalize": ["strip", "case"]}


def trained(run: Run) -> list[dict[str, Any]]:
    """The records of the run's students."""
    return [record.to_json() for record in train_students(run) or ()]


def run_of(folder: Path, **changes: Any) -> Run:
    own = {"accept": [CHECK], "max_new_tokens": 8}
    student = {
        "name": "s", "contexts": ["original", "none"], "steps": 2, "batch_size": 4, "report_to": [], "own_answers": own,
    } | changes  # fmt: skip
    config = write_job(folder, lambda c: c.update(students=[student]))
    return Run(*load_config(config), folder / "out", say=lambda line: None, bars=False)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The base answers every third row in capitals, every third with a wrong word, and every third without an end;
    the list counts the rows that were answered.
    """
    asked: list[int] = []

    def generate(base: Any, prefix: Any, bodies: Sequence[Any], **settings: Any) -> list[tuple[int, ...]]:
        asked.append(len(bodies))
        assert settings["keep_stop"]
        assert len(prefix) > 20
        end = max(settings["stop"])
        found = []
        for i, body in enumerate(bodies):
            label = ("weather", "music", "book")[len(message_of(base, body)) % 3]
            text = label.upper() if i % 3 != 1 else "rain"
            ids = tuple(base.tokenizer(text, add_special_tokens=False)["input_ids"])
            found.append(ids if i % 3 == 2 else (*ids, end))
        return found

    def message_of(base: Any, body: Sequence[int]) -> str:
        return base.tokenizer.decode(list(body)).partition("<|im_end|>")[0].rpartition(": ")[2].lstrip(" ")

    monkeypatch.setattr(module, "generate", generate)
    return asked


def test_right_and_whole_answers_take_the_place_of_gold_under_every_context(tmp_path: Path, answers: Any) -> None:
    run = run_of(tmp_path)
    config = run.config.students[0]
    with run.opened():
        before = build_pool(run.catalogue(names_of(config)), config, 0)
        after = with_own_answers(run.task(), config, before, run.at)
    count = before.rows
    expected = {row.example_id for i, row in enumerate(before.contexts[0].rows) if i % 3 == 0}
    for old, new in zip(before.contexts, after.contexts, strict=True):
        assert new.encoded.prefix == old.encoded.prefix
        changed = {n.example_id for o, n in zip(old.rows, new.rows, strict=True) if o.gold != n.gold}
        assert changed == expected
        assert all(o.body == n.body for o, n in zip(old.rows, new.rows, strict=True))
        own = next(row for row in new.rows if row.example_id in expected)
        assert run.load_base().tokenizer.decode(own.gold[:-1]) in ("WEATHER", "MUSIC", "BOOK")
        assert own.gold[-1] in run.task().answer_ends
    assert after.own == len(expected)
    assert 0 < after.own < count


def test_answers_that_make_a_row_too_long_are_not_taken(tmp_path: Path, answers: Any) -> None:
    run = run_of(tmp_path)
    config = run.config.students[0]
    with run.opened():
        pool = build_pool(run.catalogue(names_of(config)), config, 0)
        lengths = sorted(taken_lengths(pool, with_own_answers(run.task(), config, pool, run.at)))
        limit = lengths[-1] - 1
        after = with_own_answers(run.task(), config.model_copy(update={"max_length": limit}), pool, run.at)
    assert sorted(taken_lengths(pool, after)) == [length for length in lengths if length <= limit]
    assert 0 < after.own < len(lengths)


def taken_lengths(before: Pool, after: Pool) -> list[int]:
    """Tokens of the rows with an answer of the base, under the context that makes them longest."""
    original = before.contexts[0].rows, after.contexts[0].rows
    return [len(new) for old, new in zip(*original, strict=True) if old.gold != new.gold]


def test_the_base_answers_once_and_the_student_says_how_many_were_taken(tmp_path: Path, answers: list[int]) -> None:
    [record] = trained(run_of(tmp_path))
    [again] = trained(run_of(tmp_path))
    assert len(answers) == 1
    assert record["rows_of_own_answers"] == again["rows_of_own_answers"] > 0
    [plain] = trained(run_of(tmp_path, own_answers=None))
    assert plain["rows_of_own_answers"] == 0
    assert plain["key"] != record["key"]
    assert plain["history"] != record["history"]


def test_a_base_that_really_answers_is_taken_at_its_word(tmp_path: Path) -> None:
    own = {"accept": [{"kind": "regex", "pattern": "zzz", "absent": True}], "max_new_tokens": 3}
    [record] = trained(run_of(tmp_path, own_answers=own))
    assert 0 <= record["rows_of_own_answers"] <= record["rows"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"kind": "anchored-kl"}}, "own_answers and a loss that is anchored in the original"),
        ({"loss": {"kind": "on-policy"}}, "on-policy distillation uses no gold outputs"),
        ({"own_answers": {"accept": []}}, r"own_answers\.accept: List should have at least 1 item"),
        ({"own_answers": {"accepts": [CHECK]}}, r"unknown key 'students\.0\.own_answers\.accepts'.*'accept'"),
        ({"own_answers": {"accept": ["python:nothing.py:check"]}}, r"no such file"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        trained(run_of(tmp_path, **changes))
    assert not (tmp_path / "out" / "reference").exists()
