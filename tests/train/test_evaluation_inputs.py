"""Templates written by hand, frozen prompts, and what kvopt evaluate says about wrong input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from kvopt import cli
from kvopt.errors import InputError
from kvopt.storage.keyed_rows import stored_rows, write_rows
from kvopt.task.template import Template
from kvopt.task.template_files import name_of_file, read_templates, template_from_file
from kvopt.train.evaluation.frozen import frozen_template, task_likeness
from tests.train.evaluated import write_evaluated

CHAT = Template.from_messages(
    [{"role": "system", "content": "Sort it."}, {"role": "user", "content": "Text: {{text}}\nNow: {{more}}"}]
)
PLAIN = Template.from_text("Sort it.\n{{text}} {{more}}\nLabel:")


def written(folder, name, content):
    (folder / name).write_text(content, "utf-8")
    return folder / name


def test_stored_rows_are_read_again_whatever_ends_of_lines_their_answers_hold(tmp_path):
    answers = ["a\u2028b", "a\x85b", "a\u2029b", "a\r\nb\x0c\x1c", "Ünïcödé 😀"]
    written = write_rows(tmp_path / "rows.jsonl", "k", [{"answer": answer} for answer in answers])
    assert stored_rows(tmp_path / "rows.jsonl", "k", len(answers)) == written
    assert stored_rows(tmp_path / "rows.jsonl", "other", len(answers)) is None
    assert stored_rows(tmp_path / "rows.jsonl", "k", 2) is None
    (tmp_path / "rows.jsonl").write_bytes((tmp_path / "rows.jsonl").read_bytes()[:-3])
    assert stored_rows(tmp_path / "rows.jsonl", "k", len(answers)) is None


def test_templates_of_every_shape(tmp_path):
    path = written(
        tmp_path,
        "t.yaml",
        """
- {name: leading, text: "Other words."}
- {name: whole, text: "{{text}} and {{more}}?"}
- name: messages
  messages: [{role: user, content: "{{more}} {{text}}"}]
""",
    )
    found = read_templates(path, CHAT)
    assert list(found) == ["leading", "whole", "messages"]
    assert [m.content for m in found["leading"].messages] == ["Other words.", "Text: {{text}}\nNow: {{more}}"]
    assert [m.role for m in found["whole"].messages] == ["user"]
    assert found["messages"].slot_sequence == ("more", "text")


def test_json_is_read_as_json_with_tabs_and_surrogate_pairs(tmp_path):
    entries = [{"name": "smile", "text": "😀 Other words."}]
    path = written(tmp_path, "t.json", json.dumps(entries, indent="\t"))
    assert read_templates(path, CHAT)["smile"].messages[0].content == "😀 Other words."


def test_a_pool_of_wordings_is_read_line_by_line(tmp_path):
    messages = [{"role": "system", "content": "Sort."}, {"role": "user", "content": "{{text}} {{more}}"}]
    lines = [{"name": "p1", "family": "mood", "distance": "far", "messages": messages}, {"text": "Other words."}]
    path = written(tmp_path, "my pool.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
    found = read_templates(path, CHAT)
    assert list(found) == ["p1", "my-pool-2"]
    assert [m.content for m in found["p1"].messages] == ["Sort.", "{{text}} {{more}}"]
    assert found["my-pool-2"].messages[0].content == "Other words."
    for line, message in (
        ("{", r"p\.jsonl:2: not JSON"),
        ("[1]", r"p\.jsonl:2: the entry has no usable name"),
        ('{"family": "mood"}', r"p\.jsonl: p-2: needs either messages or text"),
        ('{"text": "Only {{text}}"}', r"p\.jsonl: p-2: has the slots text"),
    ):
        with pytest.raises(InputError, match=message):
            read_templates(written(tmp_path, "p.jsonl", '{"text": "Words."}\n' + line), CHAT)


def test_one_of_several_templates_of_a_file_is_named_after_a_mark(tmp_path):
    written(tmp_path, "pool.jsonl", '{"name": "near", "text": "Near words."}\n{"name": "far", "text": "Far words."}')
    found = template_from_file(tmp_path / "pool.jsonl#far", CHAT)
    assert [m.content for m in found.messages] == ["Far words.", "Text: {{text}}\nNow: {{more}}"]
    assert [name_of_file(argument) for argument in ("a/pool.jsonl#far", "a/b.txt", "no#2.txt")] == ["far", "b", "no#2"]
    with pytest.raises(InputError, match=r"pool\.jsonl: has no template 'fax' \(known: near, far\)"):
        template_from_file(tmp_path / "pool.jsonl#fax", CHAT)
    with pytest.raises(InputError, match=r"other\.jsonl: no such file"):
        template_from_file(tmp_path / "other.jsonl#far", CHAT)
    with pytest.raises(InputError, match=r"#far: no such file"):  # a mark without a file is a file's name
        template_from_file(tmp_path / "#far", CHAT)
    written(tmp_path, "no#2", "Whole words.")  # a file of that name comes first
    assert template_from_file(tmp_path / "no#2", CHAT).messages[0].content == "Whole words."


def test_templates_of_a_text_file_are_divided_by_lines(tmp_path):
    path = written(tmp_path, "by hand.txt", "First words.\n---\n{{text}}\n{{more}}\nWhich?\n---\n")
    found = read_templates(path, PLAIN)
    assert list(found) == ["by-hand-1", "by-hand-2"]
    assert found["by-hand-1"].text == "First words.{{text}} {{more}}\nLabel:"
    assert found["by-hand-2"].text == "{{text}}\n{{more}}\nWhich?"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- {name: a, text: 'Only {{text}}'}", r"t\.yaml: a: has the slots text, the template has text, more"),
        ("- {name: a, text: x}\n- {name: a, text: y}", "two templates are named 'a'"),
        ("- {text: x}", r"t\.yaml\[0\]: the entry has no usable name"),
        ("- {name: a/b, text: x}", "no usable name"),
        ("- {name: a, txt: x}", "unknown key 'txt'"),
        ("{a: b}", "is not a list of templates"),
        ("[]", "holds no templates"),
        ("- {name: a", "not valid JSON or YAML"),
        ("- {name: a, text: 2026-13-45}", "not valid JSON or YAML"),
        ("- {name: a}", "needs either messages or text"),
    ],
)
def test_templates_that_cannot_be_used_are_named(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        read_templates(written(tmp_path, "t.yaml", content), CHAT)


def test_a_missing_file_of_templates_is_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_templates(tmp_path / "none.yaml", CHAT)


def test_the_templates_that_come_with_snips_fit_it_and_differ_in_length():
    configs = Path(__file__).parents[2] / "configs"
    config = yaml.safe_load((configs / "snips.yaml").read_text("utf-8"))
    found = read_templates(configs / "snips-templates.yaml", Template.from_json(config["template"]))
    lengths = sorted(sum(len(re.findall(r"\w+", field)) for field in template.fields) for template in found.values())
    assert len(found) == 6
    assert lengths[0] < 20
    assert lengths[-1] > 10 * lengths[0]


def test_a_frozen_prompt_keeps_the_inputs_and_nothing_else():
    chat = frozen_template(CHAT, "Count {{it}}.")
    assert [(m.role, m.content) for m in chat.messages] == [
        ("system", "Count \\{{it}}."),
        ("user", "{{text}}\n{{more}}"),
    ]
    assert frozen_template(PLAIN, "Count.").text == "Count.\n\n{{text}}\n{{more}}\n"
    user_only = Template.from_messages([{"role": "user", "content": "Sort {{text}}"}])
    assert frozen_template(user_only, "Count.").messages[0].content == "Count.\n\n{{text}}"
    slots_everywhere = Template.from_messages(
        [
            {"role": "system", "content": "Sort with {{help}}."},
            {"role": "user", "content": "{{first}}?"},
            {"role": "assistant", "content": "weather"},
            {"role": "user", "content": "And {{text}}?"},
        ]
    )
    assert [(m.role, m.content) for m in frozen_template(slots_everywhere, "Count.").messages] == [
        ("system", "Count.\n\n{{help}}"), ("user", "{{first}}\n{{text}}"),
    ]  # fmt: skip


def test_an_answer_looks_like_the_task_when_it_is_the_same_or_the_same_kind_of_json():
    same = task_likeness('{"a": 1}', '{"a":1}', json_task=True)
    assert same == {"same_as_original": (1, 1), "valid_json": (1, 1), "looks_like_task": (1, 1)}
    other = task_likeness('{"a": 2}', '{"a": 1}', json_task=True)
    assert other == {"same_as_original": (0, 1), "valid_json": (1, 1), "looks_like_task": (1, 1)}
    text = task_likeness("[1]", "music", json_task=False)
    assert text == {"same_as_original": (0, 1), "valid_json": (0, 0), "looks_like_task": (0, 1)}


@pytest.fixture
def command(capsys, monkeypatch):
    """Run ``kvopt evaluate`` in this process; returns exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["kvopt", "evaluate", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, *capsys.readouterr()

    return run


def test_the_command_prints_one_document(command, tmp_path):
    config = write_evaluated(tmp_path)
    wanted = ("--student", "base", "--context", "original", "--out", tmp_path / "out")
    code, out, err = command(config, *wanted, "--json")
    assert code == 0, err
    document = json.loads(out)["students"][0]
    assert (document["name"], document["contexts"][0]["name"]) == ("base", "original")
    code, out, _ = command(config, *wanted)
    assert "exact-match" in out
    assert "original" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--student", "s1"], "student s1: is not trained yet (kvopt train trains it)"),
        (["--context", "nothing"], "no context 'nothing'"),
        (["--set", "evaluate.metrics=[exact]"], "unknown value 'exact'"),
        (["--set", "evaluate.metrics=[{kind: rouge-l, name: gold_nll}]"], "'gold_nll' is measured anyway"),
        (["--set", "evaluate.contexts=[kv-9]"], "no learned context 'kv-9'"),
        (["--set", "evaluate.templates=none.yaml"], "none.yaml: no such file"),
        (["--set", "evaluate.metrics=['python:mine.py:f']"], "no such file"),
        (["--set", "evaluate.max_new_tokens=500"], "500 new ones do not fit the window of 512"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(command, tmp_path, arguments, message):
    code, out, err = command(write_evaluated(tmp_path), *arguments, "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err
