"""Prompts of other tools: placeholders and blocks are named with kvopt's form, files are read or named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvopt.config.sections import TemplateConfig
from kvopt.errors import InputError
from kvopt.mutate.generators.file import FileVariants
from kvopt.mutate.proposals import Request
from kvopt.run.inputs import Inputs, read_inputs
from kvopt.task.foreign import foreign_placeholders
from kvopt.task.template import Template
from kvopt.task.template_files import configured_template, template_from_file
from tests.jobs import write_job

CHAT = [{"role": "system", "content": "Sort."}, {"role": "user", "content": "Text: {{text}}"}]


@pytest.mark.parametrize(
    ("source", "named", "form"),
    [
        ("{{{text}}}", "{{{text}}}", "a slot is {{text}}"),
        ("{{ topic | default('pets') }}", "{{ topic | default('pets') }}", "{{topic}}"),
        ("{{topics[0]}}", "{{topics[0]}}", "{{topics_0}}"),
        ("{{target language}}", "{{target language}}", "{{target_language}}"),
        ("{{тема}}", "{{тема}}", "a slot is a name of ASCII letters"),
        ("{% if text %}", "{% if text %}", "a block is not run"),
        ("{% if text %}a {{text}} b{% endif %}", "{% endif %}", "a block is not run"),
        ("{%- for x in y -%}", "{%- for x in y -%}", "a block is not run"),
        ("{{#if text}}", "{{#if text}}", "a block is not run"),
        ("{{> header}}", "{{> header}}", "a block is not run"),
        ("{# note #}", "{# note #}", "a comment is not left out"),
        ("Topic: {topic}.", "{topic}", "a slot is {{topic}}"),
        ("Topic: ${topic}.", "${topic}", "a slot is {{topic}}"),
        ('Reply {{"label": "x"}}', '{{"label": "x"}}', "two braces stay two"),
        ("[[ ## question ## ]]", "[[ ## question ## ]]", "DSPy"),
    ],
)
def test_a_placeholder_or_block_of_another_language_is_named_with_kvopts_form(
    source: str, named: str, form: str
) -> None:
    [warning] = foreign_placeholders(Template.from_text(source + "\nText: {{text}}"))
    assert named in warning
    assert form in warning
    assert "template.literal: true" in warning


@pytest.mark.parametrize(
    "source",
    [
        '{"label": "x", "score": {"a": 1}}',
        "{{ text }} {{a.b-c}}",
        r"\{{text}}",
        "def f(): return {1, 2}",
        "{}",
        "{ }",
        "100% {…} [[1]] $x",
        "if (x) { return y; }",
        "{{{{",
    ],
)
def test_what_no_tool_fills_in_is_not_named(source: str) -> None:
    assert foreign_placeholders(Template.from_text(source + "\nText: {{text}}")) == []


def test_many_are_named_once_in_one_line_and_counted() -> None:
    [warning] = foreign_placeholders(Template.from_text("{a} {b} {c} {d} {e} {f} {a}\n{{text}}"))
    assert warning.count("{a} (") == 1
    assert "and 2 more" in warning


def inputs_of(folder: Path, template: dict[str, Any]) -> Inputs:
    from kvopt.config.document import load_config

    return read_inputs(*load_config(write_job(folder, lambda c: c.update(template=template, contexts=[]))))


def test_a_config_warns_once_and_literal_silences_it(tmp_path: Path) -> None:
    text = "Sort {topic}.\nText: {{text}}"
    assert "{topic}" in inputs_of(tmp_path, {"text": text}).warnings[0]
    assert not any("{topic}" in line for line in inputs_of(tmp_path, {"text": text, "literal": True}).warnings)


# ---- files


@pytest.mark.parametrize("ending", ["json", "yaml"])
@pytest.mark.parametrize("value", [CHAT, {"messages": CHAT}])
def test_chat_prompts_in_files_are_messages_wherever_a_text_is_read(tmp_path: Path, ending: str, value: Any) -> None:
    path = tmp_path / f"chat.{ending}"
    path.write_text(json.dumps(value) if ending == "json" else yaml.safe_dump(value))
    section = TemplateConfig(file=path.name)
    template, _ = configured_template(section, tmp_path)
    assert template == Template.from_messages(CHAT)
    assert template_from_file(path, Template.from_messages(CHAT)) == template
    variants = FileVariants(path, Template.from_messages(CHAT))
    assert variants.limit == 1
    [proposal] = variants.propose([Request(template, "leading", (), 0, 0, 0)])
    assert proposal.template == template


def test_a_run_writes_the_messages_of_a_file_down_and_reads_them_back(tmp_path: Path) -> None:
    marked = [{"role": "system", "content": "{{keep:Sort}} it."}, CHAT[1]]
    (tmp_path / "chat.yaml").write_text(yaml.safe_dump(marked))
    inputs = inputs_of(tmp_path, {"file": "chat.yaml"})
    assert inputs.kept == ("Sort",)
    written = inputs.resolved()["template"]
    assert written["file"] is None
    assert configured_template(TemplateConfig(**written), tmp_path) == (inputs.template, ("Sort",))


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ({"_type": "prompt", "template": "Sort {text}", "input_variables": ["text"]}, "is a LangChain prompt"),
        ({"lc": 1, "type": "constructor", "id": ["langchain"], "kwargs": {}}, "is a LangChain prompt"),
        ({"prompts": ["a.txt"], "providers": ["openai:gpt"]}, "is a promptfoo config"),
        ({"predict": {"signature": {"instructions": "Sort."}, "demos": []}, "metadata": {}}, "is a DSPy program"),
        ({"template": "x"}, "holds no chat messages and no text"),
        ("just text", "holds no chat messages and no text"),
        ([{"role": "human", "content": "{{text}}"}], "unknown role 'human'"),
        ([{"role": "user"}], "a message needs a role and a content"),
    ],
)
def test_files_of_other_tools_are_named_with_the_mend(tmp_path: Path, value: Any, what: str) -> None:
    (tmp_path / "prompt.json").write_text(json.dumps(value))
    with pytest.raises(InputError, match=what):
        configured_template(TemplateConfig(file="prompt.json"), tmp_path)


def test_a_list_of_variants_in_json_is_several(tmp_path: Path) -> None:
    path = tmp_path / "variants.json"
    path.write_text(json.dumps([{"messages": CHAT}, CHAT, "Text: {{text}}"]))
    assert FileVariants(path, Template.from_messages(CHAT)).limit == 3
