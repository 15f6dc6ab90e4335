"""The configs that come with kvopt: template and data fit each other."""

import re
from pathlib import Path

import pytest
import yaml

from kvopt.config.data import DataConfig
from kvopt.task.examples import load_dataset
from kvopt.task.template import Template

CONFIGS = Path(__file__).parents[1] / "configs"


def sections(name):
    document = yaml.safe_load((CONFIGS / name).read_text("utf-8"))
    template = {key: document["template"][key] for key in ("messages", "text") if key in document["template"]}
    return Template.from_json(template), document["data"]


def test_the_demo_has_enough_rows_and_no_warnings():
    template, data = sections("demo.yaml")
    loaded = load_dataset(DataConfig(**data), template, CONFIGS, 0)
    assert (len(loaded.train), len(loaded.selection), len(loaded.validation)) == (240, 24, 48)
    assert loaded.warnings == ()


def test_the_starter_loads_with_the_data_that_is_copied_beside_it(tmp_path):
    template, data = sections("template.yaml")
    for part in ("train", "validation"):
        (tmp_path / f"{part}.jsonl").write_bytes((CONFIGS / f"template-{part}.jsonl").read_bytes())
    loaded = load_dataset(DataConfig(**data), template, tmp_path, 0)
    assert (len(loaded.train), len(loaded.selection), len(loaded.validation)) == (16, 4, 6)
    assert loaded.warnings == ()


@pytest.mark.parametrize(
    ("name", "slot"), [("demo.yaml", "code"), ("snips.yaml", "utterance"), ("template.yaml", "message")]
)
def test_the_system_message_is_a_paragraph_of_instructions_and_the_user_message_has_the_slot(name, slot):
    template, _ = sections(name)
    system, user = template.messages
    assert template.slots == (slot,)
    assert (system.role, user.role) == ("system", "user")
    assert 40 <= len(re.findall(r"\w+", system.content)) <= 160
