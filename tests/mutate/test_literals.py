"""Wordings that somebody wrote: the task's literals must stand in them, their layout is free."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvopt.mutate.generators.file import FileVariants
from kvopt.mutate.literals import invented_literal, lost_literal, needed_literals
from kvopt.mutate.proposals import Request
from kvopt.mutate.spans import compile_protect
from kvopt.mutate.validity import Checker
from kvopt.storage.files import write_json
from kvopt.task.template import Template

SYSTEM = """\
Read the request and answer with one line of JSON.

Format: {"intent": "NAME", "slots": {"slot_name": "words of the request"}}

Choose one intent:
- BookTable: reserve a table
- get_weather: ask for the weather

Write at most 20 words, as in "Return the names.", and keep file paths such as /etc/hosts.
"""
ORIGINAL = Template.from_json(
    {"messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "{{utterance}}"}]}
)


def wording(system: str, user: str = "{{utterance}}") -> Template:
    return ORIGINAL.with_fields([system, user])


def reason(candidate: Template, protect: tuple[str, ...] = ()) -> str | None:
    rejection = Checker(ORIGINAL, "all", compile_protect(protect)).check(candidate, written=True)
    return rejection and f"{rejection.reason}: {rejection.detail}"


def test_the_literals_of_a_template_are_its_labels_keys_numbers_and_examples() -> None:
    assert [literal.text for literal in needed_literals(ORIGINAL)] == [
        "JSON",
        '{"intent": "NAME", "slots": {"slot_name": "words of the request"}}',
        "BookTable",
        "get_weather",
        "20",
        "Return the names.",
        "/etc/hosts",
    ]


FORMAT = '{"intent": "NAME", "slots": {"slot_name": "words of the request"}}'
LAYOUTS = {
    "numbered sections": f"Section 1: JSON, one line: {FORMAT}\nSection 2: BookTable, get_weather.\n"
    'Section 3: at most 20 words, like "Return the names.", paths as /etc/hosts.',
    "tags": f"<task>JSON in one line</task>\n<format>{FORMAT}</format>\n<labels>BookTable get_weather</labels>\n"
    "<limit>20 words</limit> e.g. 'Return the names.' <path>/etc/hosts</path>",
    "format over lines": 'JSON:\n{\n  "intent": "NAME",\n  "slots": {"slot_name": "words of the request"}\n}\n'
    'BookTable or get_weather. 20 words at most ("Return the names."). Paths: /etc/hosts.',
    "named twice": f"JSON! One line of JSON: {FORMAT}. BookTable: BookTable is a table. get_weather. 20 words, at"
    " most 20. Return the names. /etc/hosts. NOTE: THAT IS ALL (TV too).",
    "a list of items": f"1. JSON, one line\n2. {FORMAT}\n3. BookTable\n4) get_weather\n5. 20 words, Return the names.\n"
    "6. /etc/hosts",
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_another_layout_is_accepted(name: str) -> None:
    assert reason(wording(LAYOUTS[name])) is None
    strict = Checker(ORIGINAL, "all").check(wording(LAYOUTS[name]))
    assert strict is not None, "what a rule may change is less"
    assert strict.reason == "changed-literal"


def test_a_literal_may_move_to_another_message() -> None:
    user = f"Answer in one line of JSON: {FORMAT}. 20 words, Return the names.\n{{{{utterance}}}}"
    assert reason(wording("BookTable, get_weather. /etc/hosts", user)) is None


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("BookTable", "BookTables", "'BookTable' is missing"),
        ("get_weather", "weather", "'get_weather' is missing"),
        ("at most 20 words", "few words", "'20' is missing"),
        ("at most 20 words", "at most 20 words, 3 lines", "the number 3 is new"),
        ('"slots"', '"entities"', '\'{"intent": "NAME", "slots": {"slot_name": "words of the request"}}\' is missing'),
        ("Return the names", "Returns the names", "'Return the names.' is missing"),
        ("one line of JSON", "one line of JSON or YAML", "YAML is new: another format"),
        ("one line of JSON", "one line", "'JSON' is missing"),
        ("/etc/hosts", "/etc/passwd", "'/etc/hosts' is missing"),
    ],
)
def test_what_would_change_the_answer_is_refused(old: str, new: str, fault: str) -> None:
    changed = wording(SYSTEM.replace(old, new))
    assert reason(changed) == f"changed-literal: {fault}"
    assert (lost_literal(ORIGINAL, changed) or invented_literal(ORIGINAL, changed)) == fault


PAIR = Template.from_text("Which word has more letters, {{one}} or {{two}}?\nAnswer:")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("Compare two words.\nWord 1: {{one}}\nWord 2: {{two}}\nThe longer one:", None),
        ('The longer of\n(1) = "{{one}}"\nB 2. {{two}}', None),
        ("Compare.\nWord 1: {{one}}\nWord 3: {{two}}", "the number 3 is new"),  # there are two
        ("Compare.\nWord 1: {{one}}, at most 2 {{two}}", "the number 2 is new"),
        ("Compare.\nWord 1: {{one}}\nWord 2: {{two}}\nIn 1 word:", "the number 1 is new"),
    ],
)
def test_numbers_that_name_the_inputs_are_layout(text: str, fault: str | None) -> None:
    assert invented_literal(PAIR, Template.from_text(text)) == fault


def test_what_the_author_marked_stays_as_often_as_it_was() -> None:
    protect = ("table",)
    assert reason(wording(SYSTEM.replace("Read the request", "See the request")), protect) is None
    assert reason(wording(SYSTEM.replace("reserve a table", "reserve")), protect) == (
        "changed-literal: 'table' is missing"
    )


def test_a_file_of_wordings_is_judged_as_written(tmp_path: Path) -> None:
    variants = [{"messages": wording(text).to_json()["messages"]} for text in LAYOUTS.values()]
    write_json(tmp_path / "pool.json", variants)
    source = FileVariants(tmp_path / "pool.json", ORIGINAL)
    for turn in range(len(variants)):
        [proposal] = source.propose([Request(ORIGINAL, "all", (), 0, 0, turn)])
        assert proposal.template is not None
        assert Checker(ORIGINAL, "all").check(proposal.template, written=proposal.written) is None
