"""Rows in the layouts of ShareGPT and Alpaca as data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvopt.config.data import DataConfig
from kvopt.errors import InputError
from kvopt.task.examples import Dataset, load_dataset
from kvopt.task.rendered_prompts import infer_file
from kvopt.task.template import Template

ONE = Template.from_text("Q: {{question}}\nA:")
PAIR = Template.from_text("{{instruction}}\nText: {{input}}\nAnswer:")
ALONE = Template.from_text("Do this: {{instruction}}\n")


def sharegpt(i: int, *more: tuple[str, str]) -> dict[str, Any]:
    turns = [("system", "Be brief."), ("human", f"How far is town {i}?"), ("gpt", f"{i} km."), *more]
    return {"conversations": [{"from": speaker, "value": text} for speaker, text in turns]}


def alpaca(i: int, given: str = "") -> dict[str, str]:
    return {"instruction": f"Name the colour of thing {i}.", "input": given, "output": f"Blue {i}."}


def load(folder: Path, rows: Sequence[Any], template: Template, **settings: Any) -> Dataset:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return load_dataset(DataConfig(train="rows.jsonl", **settings), template, folder, 0)


def values_of(data: Dataset) -> list[dict[str, str]]:
    rows = [*data.train, *data.selection, *data.validation]
    return [example.values for example in sorted(rows, key=lambda example: int(example.id.split(":")[1]))]


def test_a_conversation_gives_the_last_question_and_the_last_answer(tmp_path: Path) -> None:
    data = load(tmp_path, [sharegpt(i) for i in range(9)], ONE)
    assert values_of(data)[3] == {"question": "How far is town 3?"}
    assert {example.output for example in data.train} <= {f"{i} km." for i in range(9)}
    assert not [warning for warning in data.warnings if "no slot uses" in warning]


def test_paths_reach_into_a_conversation(tmp_path: Path) -> None:
    template = Template.from_text("{{how}} {{question}}")
    columns = {"how": "messages.system", "question": "messages.user"}
    data = load(tmp_path, [sharegpt(i) for i in range(9)], template, columns=columns, output="messages.assistant")
    assert values_of(data)[0] == {"how": "Be brief.", "question": "How far is town 0?"}


def test_a_longer_conversation_is_told_of(tmp_path: Path) -> None:
    rows = [sharegpt(i, ("human", f"And by train {i}?"), ("gpt", f"{i} minutes.")) for i in range(9)]
    data = load(tmp_path, rows, ONE)
    assert values_of(data)[2] == {"question": "And by train 2?"}
    assert "of its conversation" in data.warnings[0]


def test_a_conversation_without_an_answer_is_refused(tmp_path: Path) -> None:
    rows = [sharegpt(i) for i in range(8)] + [sharegpt(8, ("human", "And then?"))]
    with pytest.raises(InputError, match=r"rows.jsonl:9: the last of the messages is not the assistant's"):
        load(tmp_path, rows, ONE)


@pytest.mark.parametrize("turn", [{"from": "human"}, {"value": "hello"}, {"from": "gpt", "value": None}])
def test_a_turn_that_is_none_is_refused(tmp_path: Path, turn: dict[str, Any]) -> None:
    row = {"conversations": [{"from": "human", "value": "hello"}, turn]}
    with pytest.raises(InputError, match=r"rows.jsonl:1: turn 2 of the conversation has no text in '(from|value)'"):
        load(tmp_path, [row], ONE)


def test_a_conversation_does_not_fit_a_template_with_more_slots(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"slot 'instruction' has no column 'instruction' .*data\.columns"):
        load(tmp_path, [sharegpt(i) for i in range(9)], PAIR)


def test_instruction_and_input_fill_their_slots(tmp_path: Path) -> None:
    data = load(tmp_path, [alpaca(i, f"a text {i}") for i in range(9)], PAIR)
    assert values_of(data)[4] == {"instruction": "Name the colour of thing 4.", "input": "a text 4"}


def test_one_slot_of_another_name_takes_both(tmp_path: Path) -> None:
    data = load(tmp_path, [alpaca(i, "a text" if i % 2 else "") for i in range(9)], ONE)
    assert values_of(data)[3] == {"question": "Name the colour of thing 3.\n\na text"}
    assert values_of(data)[4] == {"question": "Name the colour of thing 4."}
    assert not [warning for warning in data.warnings if "no slot uses" in warning]


def test_an_input_is_not_left_out_unasked(tmp_path: Path) -> None:
    rows = [alpaca(i, "a text" if i == 5 else "") for i in range(9)]
    with pytest.raises(InputError, match=r"rows.jsonl:6: the row has an input .* add \{\{input\}\} to the template"):
        load(tmp_path, rows, ALONE)
    data = load(tmp_path, rows, ALONE, columns={"instruction": "instruction"})
    assert values_of(data)[5] == {"instruction": "Name the colour of thing 5."}
    assert len(values_of(load(tmp_path, [alpaca(i) for i in range(9)], ALONE))) == 9


def test_an_alpaca_row_does_not_fit_a_template_with_other_slots(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"slot 'question' has no column 'question' .*data\.columns"):
        load(tmp_path, [alpaca(i) for i in range(9)], Template.from_text("{{question}} {{context}}"))


def test_a_template_is_recovered_from_both_layouts(tmp_path: Path) -> None:
    things = ("a red door", "some old bread", "seven green boats", "the night train", "my other shoe")
    prompts = [f"Sort the request into one of three labels.\nRequest: {thing}\nLabel:" for thing in things]
    (tmp_path / "s.jsonl").write_text(
        "".join(
            json.dumps({"conversations": [{"from": "human", "value": prompt}, {"from": "gpt", "value": "b"}]}) + "\n"
            for prompt in prompts
        )
    )
    (tmp_path / "a.jsonl").write_text(
        "".join(
            json.dumps({"instruction": "Sort the request into one of three labels.", "input": thing, "output": "b"})
            + "\n"
            for thing in things
        )
    )
    conversation = infer_file(tmp_path / "s.jsonl")
    assert conversation.template.is_chat
    assert conversation.outputs == ("b",) * 5
    plain = infer_file(tmp_path / "a.jsonl")
    assert (plain.template.text or "").startswith("Sort the request into one of three labels.\n\n{{")
    assert [*plain.values[1].values()] == ["some old bread"]
