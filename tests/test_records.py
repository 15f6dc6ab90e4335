"""Reading files: every format gives the same rows, and what is broken is named by file and line."""

import json

import pytest

from kvopt.errors import InputError
from kvopt.task.readers import read_records


@pytest.fixture
def read(tmp_path):
    def run(name, data):
        (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
        return [(record.fields, record.where) for record in read_records(name, tmp_path, "train")]

    return run


ROWS = [{"a": "1", "b": 'x, "y"\r\nz'}, {"a": "é", "b": ""}]


def test_jsonl_skips_blank_lines_and_a_byte_order_mark(read):
    text = "\ufeff\n" + json.dumps(ROWS[0]) + "\r\n  \n" + json.dumps(ROWS[1], ensure_ascii=False)
    assert read("d.jsonl", text) == [(ROWS[0], "d.jsonl:2"), (ROWS[1], "d.jsonl:4")]


def test_jsonl_lines_end_at_line_feeds_only(read):
    line = '{"a": "one\u2028two\x85three"}\n'
    assert read("d.jsonl", line) == [({"a": "one\u2028two\x85three"}, "d.jsonl:1")]


def test_a_json_array_names_the_line_of_each_row(read):
    assert read("d.json", json.dumps(ROWS, indent=1)) == [(ROWS[0], "d.json:2"), (ROWS[1], "d.json:6")]
    assert read("d.json", " [ ] ") == []


def test_a_json_file_may_hold_lines(read):
    assert read("d.json", '{"a": "1"}\n{"a": "2"}') == [({"a": "1"}, "d.json:1"), ({"a": "2"}, "d.json:2")]


def test_csv_follows_the_quoting_rules_and_names_starting_lines(read):
    text = '\ufeffa,b\r\n1,"x, ""y""\r\nz"\r\n\r\né,\r\n'
    assert read("d.csv", text) == [(ROWS[0], "d.csv:2"), (ROWS[1], "d.csv:5")]


def test_tsv_is_separated_by_tabs(read):
    assert read("d.tsv", "a\tb\n1,5\tx\n") == [({"a": "1,5", "b": "x"}, "d.tsv:2")]


@pytest.mark.parametrize(
    ("name", "data", "where", "what"),
    [
        ("d.jsonl", '{"a": "1"}\n{"a": \n', "d.jsonl:2", "broken JSON at column 7"),
        ("d.jsonl", '{"a": "1"} {"a": "2"}', "d.jsonl:1", "broken JSON at column 12"),
        ("d.jsonl", '{"a": "1", "b": "2", "a": "3"}', "d.jsonl:1", "column 'a' is named twice"),
        ("d.jsonl", '{"a": NaN}', "d.jsonl:1", "NaN is not JSON"),
        ("d.jsonl", '["a"]', "d.jsonl:1", "a list, not an object"),
        ("d.jsonl", "3", "d.jsonl:1", "not an object"),
        ("d.jsonl", "[" * 100_000, "d.jsonl:1", "nested too deeply"),
        ("d.jsonl", b'{"a": "1"}\n{"a": "\xff"}', "d.jsonl:2", "not UTF-8 text (byte 0xff)"),
        ("d.json", '[{"a": "1"},\n{"a" "2"}]', "d.json:2", "broken JSON at column 6"),
        ("d.json", '[{"a": "1"}\n{"a": "2"}]', "d.json:2", "broken JSON at column 1"),
        ("d.json", '[{"a": "1"}', "d.json:1", "broken JSON"),
        ("d.json", '[{"a": "1"}]\nx', "d.json:2", "text after the end"),
        ("d.json", b'[{"a": "1"},\n{"a": "\xff"}]', "d.json:2", "not UTF-8"),
        ("d.csv", "a,b,a\n1,2,3\n", "d.csv:1", "column 'a' is named twice"),
        ("d.csv", "a,\n1,2\n", "d.csv:1", "a column has no name"),
        ("d.csv", 'a,b\n"1\n2",3\n4\n', "d.csv:4", "1 field for 2 columns"),
        ("d.csv", 'a,b\n1,"2\n', "d.csv:2", "broken CSV"),
        ("d.csv", 'a,b\n1,"2"3\n', "d.csv:2", "broken CSV"),
        ("d.csv", b"a\n\xe9\n", "d.csv, after line 0", "not UTF-8"),
        ("d.txt", "a", "d.txt", "unknown data format '.txt'"),
    ],
)
def test_what_is_broken_is_named_by_file_and_line(read, name, data, where, what):
    with pytest.raises(InputError) as caught:
        read(name, data)
    assert caught.value.where == where
    assert what in caught.value.what


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("gone.jsonl", "no such file"),
        ("builtin:x", "no such built-in"),
        ("hf:", "not a data set name"),
        ("hf:a:b:c:d", "not a"),
    ],
)
def test_sources_that_do_not_exist_are_input_errors(tmp_path, source, what):
    with pytest.raises(InputError, match=what):
        list(read_records(source, tmp_path, "train"))


@pytest.fixture
def saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_list([{"a": "1", "n": 2.5, "m": [{"role": "user", "content": "x"}]}])
    two = datasets.Dataset.from_list([{"a": "2", "n": None, "m": []}])
    datasets.DatasetDict({"train": one, "test": two}).save_to_disk(str(tmp_path / "both"))
    one.save_to_disk(str(tmp_path / "single"))
    return tmp_path


def test_saved_hugging_face_data_sets_are_read_by_part_or_split(saved):
    def read(source, part):
        return [(record.fields, record.where) for record in read_records(source, saved, part)]

    train = {"a": "1", "n": "2.5", "m": [{"role": "user", "content": "x"}]}
    assert read("both", "train") == [(train, "both[train]:1")]
    assert read("both", "validation") == [({"a": "2", "n": None, "m": []}, "both[test]:1")]
    assert read("hf:both:test", "train")[0][0]["a"] == "2"
    assert read("single", "validation") == [(train, "single:1")]


def test_a_missing_split_and_a_folder_without_data_are_input_errors(saved):
    with pytest.raises(InputError, match=r"no split 'dev' \(there are: train, test\)"):
        list(read_records("hf:both:dev", saved, "train"))
    (saved / "empty").mkdir()
    with pytest.raises(InputError, match="cannot be loaded"):
        list(read_records("empty", saved, "train"))


def test_class_labels_become_their_names_in_lists_and_objects_too(tmp_path):
    datasets = pytest.importorskip("datasets")
    names = datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features(
        {"label": names, "all": datasets.List(names), "in": {"label": names}, "n": datasets.Value("int64")}
    )
    rows = [
        {"label": 1, "all": [0, 1], "in": {"label": 0}, "n": 1},
        {"label": -1, "all": [], "in": {"label": 1}, "n": 0},
    ]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "labels"))
    first, second = [record.fields for record in read_records("hf:labels", tmp_path, "train")]
    assert (first["label"], first["all"], first["in"], first["n"]) == ("dog", ["cat", "dog"], {"label": "cat"}, "1")
    assert (second["label"], second["in"]) == (None, {"label": "dog"})
