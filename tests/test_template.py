"""Templates: what is a slot, what is literal, and that nothing is lost between source, parts and prompt."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvopt.errors import InputError
from kvopt.task.template import Slot, Static, Template, escape, fill_source, parse, unparse

PIECES = ["{", "}", "\\", "a", " ", "\r\n", "%", "$", "é", "{{a}}", "{{", "}}", "\\{{b}}"]
AWKWARD = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)
PARTS = st.lists(
    st.one_of(AWKWARD.filter(bool).map(Static), st.sampled_from(["a", "b.c", "d-e"]).map(Slot)), max_size=6
)


def joined(parts):
    """Adjacent literals as one."""
    result = []
    for part in parts:
        if result and isinstance(part, Static) and isinstance(result[-1], Static):
            result[-1] = Static(result[-1].text + part.text)
        else:
            result.append(part)
    return tuple(result)


def test_parse_splits_literal_text_and_slots():
    assert parse("Q: {{ q }}\nA:") == (Static("Q: "), Slot("q"), Static("\nA:"))


@pytest.mark.parametrize(
    "text", ['{"a": {"b": 1}}', "{x}", "{{}}", "{{ 1x }}", "100% $HOME ${x}", "%s %(a)s", "a\r\nb", "{{a b}}"]
)
def test_what_is_not_a_slot_stays_literal(text):
    assert parse(text) == (Static(text),)
    assert fill_source(text + "{{s}}", {"s": "v"}) == text + "v"


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        (r"\{{x}}", (Static("{{x}}"),)),
        (r"C:\\{{x}}", (Static("C:\\"), Slot("x"))),
        (r"\\\{{x}}", (Static(r"\{{x}}"),)),
        (r"a\nb \\ {{x}}", (Static(r"a\nb \\ "), Slot("x"))),
        ("{{{x}}}", (Static("{"), Slot("x"), Static("}"))),
    ],
)
def test_a_backslash_escapes_a_slot_and_itself_only_before_a_slot(source, parts):
    assert parse(source) == parts


@given(PARTS)
def test_parse_undoes_unparse(parts):
    assert parse(unparse(parts)) == joined(parts)


@given(AWKWARD)
def test_escaped_text_renders_as_itself(text):
    assert fill_source(escape(text), {}) == text


@given(AWKWARD)
def test_slot_values_are_inserted_once_and_never_scanned(value):
    assert Template.from_text("<{{a}}|{{b}}|{{a}}>").fill({"a": value, "b": "{{a}}"}) == f"<{value}|{{{{a}}}}|{value}>"


def test_chat_messages_are_filled_one_by_one():
    template = Template.from_messages(
        [{"role": "system", "content": "Be {{how}}."}, {"role": "user", "content": "{{q}} {{how}}"}]
    )
    assert template.fill({"how": "brief", "q": "Why?"}) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why? brief"},
    ]
    assert template.slots == ("how", "q")
    assert template.slot_sequence == ("how", "q", "how")


def test_a_missing_value_is_an_error():
    with pytest.raises(KeyError):
        Template.from_text("{{a}}{{b}}").fill({"a": "1"})


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([], "no messages"),
        ([{"role": "user", "content": "static"}], "no slots"),
        ([{"role": "user", "content": "{{q}}"}, {"role": "assistant", "content": "{{a}}"}], "assistant"),
        ([{"role": "user"}], "content"),
        ([{"role": "user", "content": None}], "content"),
        (["hello"], "content"),
    ],
)
def test_unusable_messages_are_input_errors(messages, what):
    with pytest.raises(InputError, match=what):
        Template.from_messages(messages)


@pytest.mark.parametrize("value", [{}, {"text": "{{a}}", "messages": []}, {"text": 3}, {"messages": 3}])
def test_from_json_refuses_what_to_json_never_writes(value):
    with pytest.raises(InputError):
        Template.from_json(value)


def test_json_round_trip_and_identity():
    text = Template.from_text("a\r\n{{x}}")
    chat = Template.from_messages([{"role": "user", "content": "{{x}}"}])
    for template in (text, chat):
        assert Template.from_json(template.to_json()) == template
    assert text.sha256 != Template.from_text("a\n{{x}}").sha256
    assert text.sha256 != chat.sha256


def test_a_file_keeps_its_line_endings_and_loses_its_byte_order_mark(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"\xef\xbb\xbfQ:\r\n{{q}}\r\n")
    assert Template.from_file(path).fill({"q": "x"}) == "Q:\r\nx\r\n"


@pytest.mark.parametrize("data", [None, b"\xff{{q}}", b"no slot"])
def test_an_unreadable_file_is_an_input_error_that_names_it(tmp_path, data):
    path = tmp_path / "prompt.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(InputError, match=r"prompt\.txt"):
        Template.from_file(path)


def test_with_fields_replaces_the_source_and_keeps_the_roles():
    template = Template.from_messages([{"role": "system", "content": "Rules."}, {"role": "user", "content": "{{q}}"}])
    other = template.with_fields(["Other.", "{{q}}!"])
    assert [m.role for m in other.messages] == ["system", "user"]
    assert other.fields == ("Other.", "{{q}}!")
    with pytest.raises(ValueError, match="1 fields"):
        template.with_fields(["x"])
