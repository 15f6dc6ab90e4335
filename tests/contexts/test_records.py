"""Records of contexts (kvopt.json, adapter_config.json) that say something impossible: one line, whoever reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvopt.contexts import load_context
from kvopt.errors import InputError
from kvopt.export.inspection import describe
from kvopt.export.writing import export
from tests.export.readers import saved
from tests.jobs import entries
from tests.tasks import make_task
from tests.tiny import tiny_base


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A context folder."""
    saved(make_task(tiny_base("llama"), tmp_path / "task"), "kv", tmp_path / "c")
    return tmp_path / "c"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(entries(path) | changes), "utf-8")


def refused_everywhere(folder: Path, message: str) -> None:
    """Reading, describing and exporting say the same, and nothing is written."""
    out = folder.parent / "out"
    for use in (lambda: load_context(folder, tiny_base("llama")), lambda: describe(folder)):
        with pytest.raises(InputError, match=message):
            use()
    with pytest.raises(InputError, match=message) as caught:
        export(folder, "peft", out)
    assert "\n" not in str(caught.value)
    assert not out.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"base": "llama"},
        {"base": {"weights": 3}},
        {"positions": [0]},
        {"positions": {"first": -1}},
        {"positions": {"first": "x"}},
        {"settings": [1]},
        {"history": [{"step": 1}]},
        {"history": 3},
        {"template_tokens": "x"},
        {"template_sha256": 1},
        {"origin": "truncate"},
        {"origin": {"operation": "move", "of": [{}]}},
        {"scores": {"validation": {}}},
        {"scores": {"validation": {"kl_forward": {"mean": 0.1, "ci95": [1.0]}}}},
        {"name": 3},
    ],
    ids=str,
)
def test_a_record_with_an_entry_of_a_wrong_type_is_damaged(folder: Path, changes: dict[str, Any]) -> None:
    edit(folder / "kvopt.json", **changes)
    refused_everywhere(folder, rf"kvopt\.json: is damaged: {next(iter(changes))}")


@pytest.mark.parametrize("name", ["../../evil", "a/b", "a\\b", "..", "", ".hidden", "two\nlines", "x" * 300])
def test_a_name_that_would_lead_elsewhere_is_refused(folder: Path, name: str) -> None:
    """The name of somebody's adapter becomes the name of a folder."""
    edit(folder / "kvopt.json", name=name)
    refused_everywhere(folder, "name: must be a plain file name")


@pytest.mark.parametrize("name", ["kv-8+soft-6", "é 漢字 (2)", "=x"])
def test_odd_names_that_are_file_names_are_kept(folder: Path, name: str) -> None:
    edit(folder / "kvopt.json", name=name)
    assert describe(folder)["name"] == name


@pytest.mark.parametrize(
    "changes", [{"num_layers": "3"}, {"token_dim": [8]}, {"num_virtual_tokens": "x"}, {"base_model_name_or_path": 3}]
)
def test_an_adapter_config_with_an_entry_of_a_wrong_type_is_damaged(folder: Path, changes: dict[str, Any]) -> None:
    edit(folder / "adapter_config.json", **changes)
    refused_everywhere(folder, rf"adapter_config\.json: is damaged: {next(iter(changes))}")
