"""The short forms of the campaigns: kills and a full disk anywhere, caches that are closed or gone, damaged and odd
input of every kind.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvopt.documents.ledger import read_ledger
from kvopt.documents.validated import json_value
from kvopt.errors import InputError
from kvopt.mutate.generators.file import FileVariants
from kvopt.mutate.mutation import read_mutations
from kvopt.storage.files import parsed_json, read_json
from kvopt.storage.keyed_rows import key_of_rows, stored_rows
from kvopt.task.readers import read_records
from kvopt.task.template import Slot, Template, parse
from kvopt.task.template_files import template_from_file
from tests.campaigns.damage import change_json, change_lines, change_tensors
from tests.campaigns.strict import TEXT, json_rows, slots_of

ROOT = Path(__file__).parents[1]


def campaign(name: str, *arguments: str) -> str:
    """What a campaign prints; it must end without a fault."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.campaigns.{name}", *arguments],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return done.stdout


@pytest.mark.skipif(os.name == "nt", reason="no fork")
def test_stopped_anywhere_the_same_command_ends_in_the_same_bytes_and_leaves_nothing_half_written() -> None:
    document = json.loads(campaign("kills", "--short", "--kills", "20", "--full", "4", "--pairs", "1", "--json"))
    assert document["faults"] == []
    counts = {what: sum(n for _, this, n in document["table"] if this == what) for _, what, _ in document["table"]}
    assert counts["killed before"] >= 3
    assert counts["killed inside"] >= 5
    assert counts["disk full"] >= 1


@pytest.mark.skipif(sys.platform != "linux", reason="capset, which lets modes of files bind root, is Linux's")
def test_a_cache_or_run_directory_that_cannot_be_written_or_vanishes_loses_nothing() -> None:
    document = json.loads(campaign("caches", "--vanish", "5", "--json"))
    assert document["faults"] == []
    seen = {what for _, what, _ in document["table"]}
    assert {"full cache closed: 0", "empty cache closed: 2", "run closed: 2", "compare of it: 0"} <= seen
    assert any(what.startswith("cache gone: ") for what in seen)


@pytest.mark.skipif(os.name == "nt", reason="no fork")
@pytest.mark.parametrize("first", [0, 250])
def test_damaged_and_odd_input_is_one_line_or_right(first: int) -> None:
    out = campaign("fuzz", "--cases", "250", "--first", str(first))
    assert out.rstrip().endswith("0 faults")
    counts = [list(map(int, re.findall(r"\d+", line[16:]))) for line in out.strip().splitlines()[1:-1]]
    assert sum(map(sum, counts)) == 250
    accepted = sum(row[0] for row in counts)
    assert 50 < accepted < 200, "most of it is either right or wrong"


# ---- the strict readers of the campaign against kvopt's, on whatever Hypothesis finds


@given(st.text(st.sampled_from("{}\\ {}{}ab_.-1é\u2003\n"), max_size=40))
def test_slots_are_those_that_a_reader_character_by_character_finds(text: str) -> None:
    found = list(dict.fromkeys(part.name for part in parse(text) if isinstance(part, Slot)))
    assert found == slots_of(text)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2)
)
ROWS = st.lists(st.fixed_dictionaries({"text": VALUES, "output": VALUES}), min_size=1, max_size=3)


@given(rows=ROWS, ascii_only=st.booleans())
def test_rows_are_those_that_a_strict_reader_takes(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], ascii_only: bool
) -> None:
    from kvopt.task.columns import Columns, NoValue

    data = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows).encode("utf-8", "surrogatepass")
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    path.write_bytes(data)
    columns, wanted = Columns(("text",), {}, "output"), json_rows(data)
    try:
        records = list(read_records("rows.jsonl", path.parent, "train"))
        taken = [(columns.values(record.fields)["text"], columns.gold(record.fields)) for record in records]
    except (InputError, NoValue):
        assert wanted is None
    else:
        assert taken == wanted


@given(st.randoms(use_true_random=False))
def test_damage_of_every_kind_is_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, chance: random.Random
) -> None:
    """Every reader of JSON that kvopt has, on the same damaged document."""
    folder = tmp_path_factory.getbasetemp()
    record = {"id": "a", "name": None, "attempt": 0, "accepted": False, "reason": "x", "detail": None, "family": "f"}
    record |= {"operators": [], "lineage": [], "seed": 1, "template": {"text": "Say {{text}}"}, "search": "s"}
    line = json.dumps(record).encode() + b"\n"
    (folder / "it.json").write_bytes(change_json(chance, line))
    (folder / "it.jsonl").write_bytes(change_lines(chance, line * 3))
    for read, name in READERS:
        said = ""
        try:
            read(folder / name)
        except InputError as error:
            said = str(error)
        assert "\n" not in said


def variants(path: Path) -> object:
    return FileVariants(path, Template.from_text(TEXT))


READERS: tuple[tuple[Callable[[Path], object], str], ...] = (
    (read_json, "it.json"),
    (json_value, "it.json"),
    (lambda path: template_from_file(path, Template.from_text(TEXT)), "it.json"),
    (read_mutations, "it.jsonl"),
    (variants, "it.jsonl"),
    (read_ledger, "it.jsonl"),
    (lambda path: stored_rows(path, "k", 3), "it.jsonl"),
    (key_of_rows, "it.jsonl"),
    (lambda path: list(read_records(path.name, path.parent, "train")), "it.jsonl"),
)


def test_json_that_is_nested_too_deeply_is_a_value_error_as_any_other_fault_is() -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parsed_json("[" * 100_000)


def test_damage_of_a_safetensors_file_is_damage() -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    data = len(header).to_bytes(8, "little") + header + b"\x00" * 4
    damaged = [change_tensors(random.Random(seed), data) for seed in range(50)]
    assert sum(one != data for one in damaged) > 45
