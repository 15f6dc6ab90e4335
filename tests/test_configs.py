"""The configs that come with kvopt: template and data fit each other."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml

from kvopt.config.data import DataConfig
from kvopt.task.examples import load_dataset
from kvopt.task.template import Template
from kvopt.task.template_files import template_from_file

CONFIGS = Path(__file__).parents[1] / "configs"


def sections(name):
    document = yaml.safe_load((CONFIGS / name).read_text("utf-8"))
    template = {key: document["template"][key] for key in ("messages", "text") if key in document["template"]}
    return Template.from_json(template), document["data"]


@pytest.mark.parametrize(("name", "rows"), [("demo.yaml", (64, 8, 16)), ("demo-full.yaml", (240, 24, 48))])
def test_the_demos_have_enough_rows_and_no_warnings(name, rows):
    template, data = sections(name)
    loaded = load_dataset(DataConfig(**data), template, CONFIGS, 0)
    assert (len(loaded.train), len(loaded.selection), len(loaded.validation)) == rows
    assert loaded.warnings == ()


def test_the_demo_asks_for_the_words_of_the_message_and_its_examples_are_no_row():
    template, data = sections("demo.yaml")
    loaded = load_dataset(DataConfig(**data), template, CONFIGS, 0)
    shown = {message.content for message in template.messages}
    for example in (*loaded.train, *loaded.selection, *loaded.validation):
        reminder = json.loads(example.output)
        assert list(reminder) == ["task", "day", "time"]
        assert all(words.lower() in example.values["message"].lower() for words in reminder.values())
        assert example.values["message"] not in shown
    for message, answer in zip(template.messages[1:-1:2], template.messages[2:-1:2], strict=True):
        assert (message.role, answer.role) == ("user", "assistant")
        assert all(words.lower() in message.content.lower() for words in json.loads(answer.content).values())


def test_the_short_prompt_of_the_demo_is_a_seventh_of_it_and_has_its_slot():
    template, _ = sections("demo.yaml")
    short = template_from_file(CONFIGS / "demo-short.yaml", template)
    assert short.slots == template.slots
    assert sum(map(len, short.fields)) < sum(map(len, template.fields)) / 7


def test_the_rows_of_the_demo_are_those_that_the_tool_writes():
    path = CONFIGS.parent / "tools" / "make_demo_data.py"
    spec = importlib.util.spec_from_file_location("make_demo_data", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    names = ("demo-train.jsonl", "demo-validation.jsonl")
    stored = [json.loads(line) for name in names for line in (CONFIGS / name).read_text("utf-8").splitlines()]
    assert stored == tool.rows()


def test_the_starter_loads_with_the_data_that_is_copied_beside_it(tmp_path):
    template, data = sections("template.yaml")
    for part in ("train", "validation"):
        (tmp_path / f"{part}.jsonl").write_bytes((CONFIGS / f"template-{part}.jsonl").read_bytes())
    loaded = load_dataset(DataConfig(**data), template, tmp_path, 0)
    assert (len(loaded.train), len(loaded.selection), len(loaded.validation)) == (16, 4, 6)
    assert loaded.warnings == ()


@pytest.mark.parametrize(
    ("name", "slot"), [("demo-full.yaml", "code"), ("snips.yaml", "utterance"), ("template.yaml", "message")]
)
def test_the_system_message_is_a_paragraph_of_instructions_and_the_user_message_has_the_slot(name, slot):
    template, _ = sections(name)
    system, user = template.messages
    assert template.slots == (slot,)
    assert (system.role, user.role) == ("system", "user")
    assert 40 <= len(re.findall(r"\w+", system.content)) <= 160
