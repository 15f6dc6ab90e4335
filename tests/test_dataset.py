"""Data sets: what is read, what is refused and how it is named, and how rows are divided."""

import ast
import json
import re
import textwrap

import pytest
from pydantic import ValidationError

from kvopt.config.data import DataConfig
from kvopt.errors import InputError
from kvopt.task.examples import load_dataset
from kvopt.task.template import Template

QUESTION = Template.from_text("Q: {{question}}\nA:")
TWO = Template.from_text("{{context}}\n{{question}}")


def rows(count, start=0, **more):
    return [{"question": f"q{i}", "output": f"a{i}", **more} for i in range(start, start + count)]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path.name


@pytest.fixture
def load(tmp_path):
    """Load ``train`` (records, or the text of a file) with a template and settings."""

    def run(train, validation=None, template=QUESTION, name="train.jsonl", seed=0, **settings):
        if isinstance(train, str | bytes):
            (tmp_path / name).write_bytes(train.encode() if isinstance(train, str) else train)
        else:
            write(tmp_path / name, train)
        if validation is not None:
            settings["validation"] = write(tmp_path / "validation.jsonl", validation)
        return load_dataset(DataConfig(train=name, **settings), template, tmp_path, seed)

    return run


def numbers(examples):
    return [int(example.id.split(":")[1]) for example in examples]


def fails(load, what, where, *args, **settings):
    """Loading is refused in one line, with this text at this place."""
    with pytest.raises(InputError, match=re.escape(what)) as caught:
        load(*args, **settings)
    assert caught.value.where == where
    assert "\n" not in str(caught.value)
    return caught.value


# Division


def test_limits_hold_in_file_order_and_selection_follows_training(load):
    data = load(rows(100), rows(20, 1000), limit={"train": 50, "selection": 10, "validation": 5})
    assert numbers(data.train) == list(range(50))
    assert numbers(data.selection) == list(range(50, 60))
    assert numbers(data.validation) == list(range(5))
    assert data.train[12].id == "train:12"
    assert data.train[12].source == "train.jsonl:13"
    assert data.warnings == ()


def test_selection_is_carved_out_of_training_when_there_is_nothing_beyond(load):
    data = load(rows(100), rows(5, 1000), limit={"selection": 10})
    assert len(data.selection) == 10
    assert sorted(numbers(data.train) + numbers(data.selection)) == list(range(100))
    assert numbers(data.selection) == sorted(numbers(data.selection))


def test_selection_takes_what_is_beyond_and_carves_the_rest(load):
    data = load(rows(54), rows(5, 1000), limit={"train": 50, "selection": 10})
    assert len(data.selection) == 10
    assert {50, 51, 52, 53} <= set(numbers(data.selection))
    assert len(data.train) == 44


def test_few_rows_give_a_small_selection_and_a_warning(load):
    data = load(rows(4), rows(5, 1000), limit={"selection": 32})
    assert (len(data.train), len(data.selection)) == (3, 1)
    assert "only 1 row for selection, not 32" in data.warnings[0]


def test_nobody_is_warned_of_a_number_that_nobody_set(load):
    data = load(rows(4), rows(5, 1000))
    assert (len(data.train), len(data.selection)) == (3, 1)
    assert data.warnings == ()


def test_one_training_row_is_too_few(load):
    fails(load, "too few different rows", "train.jsonl", rows(1), rows(5, 1000))


def test_validation_is_set_aside_by_content_and_not_by_place(load):
    first = load(rows(200), validation_fraction=0.2)
    second = load([{"question": "new", "output": "a"}, *reversed(rows(200))], validation_fraction=0.2)
    assert 20 <= len(first.validation) <= 60
    assert {e.key for e in first.validation} <= {e.key for e in second.validation}
    assert {e.key for e in first.validation} != {
        e.key for e in load(rows(200), validation_fraction=0.2, seed=1).validation
    }


def test_the_three_parts_share_no_values(load):
    data = load(rows(60) + rows(60), rows(9, 40), leakage="warn", limit={"train": 30, "selection": 20})
    keys = [{e.key for e in part} for part in (data.train, data.selection, data.validation)]
    assert keys[0].isdisjoint(keys[1])
    assert keys[1].isdisjoint(keys[2])
    assert load(rows(80) + rows(80)).warnings != ()


def test_the_division_is_deterministic_and_the_identity_follows_contents_only(load):
    one, same = load(rows(90)), load(rows(90))
    assert one == same
    assert one.sha256 == same.sha256 == load(rows(90), name="other.jsonl").sha256
    changed = rows(90)
    changed[3]["output"] += "!"
    hashes = {one.sha256, load(changed).sha256, load(rows(90), seed=5).sha256, load(rows(89)).sha256}
    assert len(hashes) == 4


# Columns


def test_only_rows_in_which_the_pattern_is_found_are_used_in_every_part_and_keep_their_numbers(load):
    mixed = [
        {"question": f"q{i}", "output": f"{'ab'[i % 2]}{i}", "meta": {"kind": "xy"[i % 3 == 0]}} for i in range(24)
    ]
    data = load(mixed[:12], mixed[12:], only={"output": "^a", "meta.kind": "x"}, limit={"selection": 1})
    assert sorted(numbers(data.train + data.selection)) == [2, 4, 8, 10]
    assert numbers(data.validation) == [2, 4, 8, 10]
    assert {example.output[0] for example in (*data.train, *data.validation)} == {"a"}
    assert not [warning for warning in data.warnings if "no slot uses" in warning]


def test_patterns_that_leave_nothing_cannot_be_read_or_have_no_column_are_refused(load):
    fails(load, "data.only leaves no row (change the pattern)", "train.jsonl", rows(4), only={"output": "zzz"})
    fails(load, "'(' is not a regular expression", "data.only.output", rows(4), only={"output": "("})
    fails(load, "data.only has no column 'outputs'", "train.jsonl:1, 2, 3, 4", rows(4), only={"outputs": "a"})


def test_columns_are_mapped_by_name_and_path(load):
    records = [{"a": f"c{i}", "meta": {"q": [f"q{i}"]}, "gold.text": f"g{i}"} for i in range(9)]
    settings = {"columns": {"context": "a", "question": "meta.q.0"}, "output": "gold.text"}
    example = load(records, template=TWO, **settings).train[0]
    assert example.values == {"context": f"c{example.id[6:]}", "question": f"q{example.id[6:]}"}
    assert example.output == f"g{example.id[6:]}"


def test_one_mapping_that_names_no_slot_is_refused_with_a_suggestion(load):
    assert "did you mean 'question'" in str(
        fails(load, "not a slot", "data.columns", rows(9), columns={"questoin": "q"})
    )


def test_a_slot_without_a_column_is_named_with_file_line_and_count(load):
    records = rows(9)
    for i in (2, 4, 5, 6, 8):
        del records[i]["question"]
    fails(load, "slot 'question' has no column 'question'", "train.jsonl:3, 5, 6, 7 and 1 more", records)


def test_an_output_without_a_column_is_named(load):
    fails(
        load, "the output has no column 'gold' (the row has: question, output)", "train.jsonl:1", rows(1), output="gold"
    )


@pytest.mark.parametrize("output", ["", "  \n"])
def test_empty_outputs_are_refused(load, output):
    fails(load, "the output is empty", "train.jsonl:5", [*rows(4), {"question": "x", "output": output}])


def test_null_and_structured_values_are_refused_with_the_mend(load):
    fails(load, "'question') is null", "train.jsonl:1", [{"question": None, "output": "a"}])
    fails(load, "is an object, not text; serialise it", "train.jsonl:1", [{"question": "q", "output": {"a": 1}}])
    fails(load, "is a list, not text", "train.jsonl:1", [{"question": ["q"], "output": "a"}])
    fails(load, "surrogate", "train.jsonl:1", '{"question": "\\ud800", "output": "a"}\n')


def test_numbers_and_booleans_keep_their_json_spelling(load):
    text = "".join(f'{{"question": {i}.50e1, "output": true}}\n' for i in range(8))
    example = load(text).train[0]
    assert re.fullmatch(r"\d\.50e1", example.values["question"])
    assert example.output == "true"


def test_unused_columns_and_empty_values_are_warnings(load):
    records = rows(50, topic="x")
    records[7]["question"] = " "
    warnings = load(records).warnings
    assert "train.jsonl: columns that no slot uses: topic" in warnings
    assert "train.jsonl:8: a slot value is empty" in warnings


# Chat messages


def chat(i, *turns):
    turns = turns or (("system", "Be brief."), ("user", f"q{i}"), ("assistant", f"a{i}"))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_messages_give_the_last_user_message_and_the_last_answer(load):
    data = load([chat(i) for i in range(40)])
    number = data.train[0].id[6:]
    assert (data.train[0].values, data.train[0].output) == ({"question": f"q{number}"}, f"a{number}")


def test_paths_reach_into_messages(load):
    columns = {"context": "messages.system", "question": "messages.1.content"}
    example = load([chat(i) for i in range(9)], template=TWO, columns=columns, output="messages.assistant").train[0]
    assert example.values == {"context": "Be brief.", "question": f"q{example.id[6:]}"}


def test_text_parts_are_joined(load):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    data = load([chat(i, ("user", [*parts, {"type": "text", "text": str(i)}]), ("assistant", "x")) for i in range(9)])
    assert data.train[0].values["question"].startswith("ab")


def test_a_conversation_that_ends_with_the_user_has_no_output(load):
    fails(load, "not the assistant's", "train.jsonl:1", [chat(0, ("user", "q"), ("assistant", "a"), ("user", "and?"))])


def test_turns_that_no_slot_takes_are_a_warning(load):
    long = [chat(i, ("user", "hi"), ("assistant", "ho"), ("user", f"q{i}"), ("assistant", f"a{i}")) for i in range(40)]
    data = load(long)
    assert data.train[0].values["question"] == f"q{data.train[0].id[6:]}"
    assert "no slot takes 2 other turns of its conversation" in data.warnings[0]


def test_a_system_message_that_no_slot_takes_is_named_and_a_slot_with_its_path_takes_it(load):
    rows = [chat(i, ("system", f"s{i}"), ("user", f"q{i}"), ("assistant", f"a{i}")) for i in range(40)]
    [warning] = [line for line in load(rows).warnings if "no slot takes" in line]
    assert "no slot takes the system message of its conversation" in warning
    both = Template.from_text("{{system}} {{question}}")
    columns = {"system": "messages.system", "question": "messages.1"}
    assert not any("no slot takes" in line for line in load(rows, template=both, columns=columns).warnings)


# Duplicates and leakage


def test_duplicates_are_told_apart_from_contradictions(load):
    records = [*rows(40), rows(1)[0], {"question": "q5", "output": "other"}]
    warnings = load(records, rows(3, 99)).warnings
    assert warnings[:2] == (
        "train.jsonl:41: repeats train.jsonl:1",
        "train.jsonl:42: repeats train.jsonl:6 with another output",
    )
    fails(load, "repeats train.jsonl:1", "train.jsonl:41", records, rows(3, 99), duplicates="error")


def test_dropped_duplicates_do_not_count_towards_the_limit(load):
    data = load(rows(10) + rows(60), rows(3, 99), duplicates="drop", limit={"train": 20, "selection": 5})
    assert len({e.key for e in data.train}) == len(data.train) == 20
    assert numbers(data.train)[:11] == [*range(10), 20]


def test_leaked_rows_are_an_error_by_default_and_named_on_both_sides(load):
    error = fails(
        load,
        "has the same values as the validation row validation.jsonl:2",
        "train.jsonl:5",
        rows(50),
        [rows(1, 99)[0], rows(1, 4)[0]],
    )
    assert "data.leakage" in str(error)


def test_leaked_rows_can_be_dropped_from_training(load):
    data = load(rows(50), rows(2, 4), leakage="drop", limit={"train": 20})
    assert 4 not in numbers(data.train)
    assert len(data.validation) == 2
    assert "2 rows dropped" in data.warnings[0]


def test_rows_beyond_the_limit_do_not_leak(load):
    assert load(rows(100), rows(3, 60), limit={"train": 40, "selection": 30}).selection[20].id == "train:63"


def test_unknown_settings_are_refused():
    with pytest.raises(ValidationError, match="limits"):
        DataConfig(train="x", limits={})
    with pytest.raises(ValidationError):
        DataConfig(train="x", limit={"selection": 0})


def test_the_built_in_data_fits_its_template(tmp_path):
    config = DataConfig(
        train="builtin:stdlib-docstrings",
        validation="builtin:stdlib-docstrings",
        output="docstring",
        limit={"train": 320, "validation": 64},
    )
    data = load_dataset(config, Template.from_text("{{code}}"), tmp_path, 0)
    assert [len(data.train), len(data.selection), len(data.validation)] == [320, 32, 64]
    assert data.warnings == ()


def test_the_built_in_code_is_long_and_goes_on_after_its_docstring(tmp_path):
    source, limit = "builtin:stdlib-code", {"train": 64, "selection": 8, "validation": 16}
    config = DataConfig(train=source, validation=source, output="code", limit=limit)
    data = load_dataset(config, Template.from_text("{{signature}}{{docstring}}"), tmp_path, 0)
    assert [len(data.train), len(data.selection), len(data.validation)] == [64, 8, 16]
    assert data.warnings == ()
    for example in (*data.train, *data.selection, *data.validation):
        assert 3_300 <= len(example.output) <= 12_000
        assert example.values["signature"].endswith(":")
        assert not example.output[0].isspace()
        whole = example.values["signature"] + "\n" + textwrap.indent(f'"""doc"""\n{example.output}', "    ")
        compile(whole, example.source, "exec", dont_inherit=True, flags=ast.PyCF_ONLY_AST)
    modules = [{e.source.rpartition(":")[0] for e in part} for part in (data.train, data.validation)]
    assert not modules[0] & modules[1]
    with pytest.raises(InputError, match="there are builtin:stdlib-docstrings and builtin:stdlib-code"):
        load_dataset(DataConfig(train="builtin:other"), Template.from_text("{{code}}"), tmp_path, 0)
