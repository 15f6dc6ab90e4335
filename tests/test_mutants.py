"""The mutation tester: which faults it makes, that ids outlive moved lines, and that a journal is gone on with."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = b'''"""A module."""
from typing import Any

Names = dict[str, Any]


def clipped(values: list[float], limit: float = 2.0, *, strict: bool = True) -> list[float]:
    """Those of ``values`` under a limit."""
    if not values:
        raise ValueError(f"none of {len(values)} values")
    found = [min(value, limit) for value in values if value < limit + 1]
    return sorted(found, key=abs)
'''


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import mutant_faults

    return mutant_faults


def made(faults: object, source: bytes) -> dict[str, str]:
    """What each mutant makes of its lines, by id."""
    return {m.id(source): m.diff(source)[1].strip() for m in faults.Mutants("m.py", source).found}  # type: ignore[attr-defined]


def test_faults_are_other_programs_and_leave_words_and_types_alone(faults: object) -> None:
    assert sorted(set(made(faults, SOURCE).values())) == sorted(
        {
            "def clipped(values: list[float], limit: float = 4.0, *, strict: bool = True) -> list[float]:",
            "def clipped(values: list[float], limit: float = 2.0, *, strict: bool = False) -> list[float]:",
            "if not (not values):",
            "if values:",
            "pass",
            "found = [max(value, limit) for value in values if value < limit + 1]",
            "found = [min(value, limit) for value in values if value <= limit + 1]",
            "found = [min(value, limit) for value in values if value >= limit + 1]",
            "found = [min(value, limit) for value in values if value < limit - 1]",
            "found = [min(value, limit) for value in values if value < limit + 2]",
            "found = [min(value, limit) for value in values if value < limit + 0]",
            "found = [min(value, limit) for value in values if True]",
            "return sorted(found)",
            "return None",
        }
    )
    for mutant in faults.Mutants("m.py", SOURCE).found:  # type: ignore[attr-defined]
        assert ast.dump(ast.parse(mutant.applied(SOURCE))) != ast.dump(ast.parse(SOURCE))


def test_ids_outlive_lines_that_move_and_tell_equal_lines_apart(faults: object) -> None:
    assert len(made(faults, b"a = 1\nb = 2\na = 1\n")) == 6
    moved = SOURCE.replace(b"\nNames", b"\nMORE = None\n\nNames")
    assert made(faults, moved) == made(faults, SOURCE)


@pytest.mark.slow
def test_a_run_finds_faults_and_goes_on_where_it_was(tmp_path: Path) -> None:
    """On the smallest module: what scipy's bootstrap gives is not given by its mutants."""
    journal, module = tmp_path / "j.jsonl", "kvopt/measure/bootstrap.py"
    command = [sys.executable, "tools/mutants.py", module, "--journal", str(journal), "--count"]
    done = subprocess.run([*command, "2"], cwd=ROOT, check=True, capture_output=True, text=True)
    first = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [entry["module"] for entry in first] == [module] * 2
    assert "| all | 2 |" in done.stdout
    subprocess.run([*command, "3"], cwd=ROOT, check=True, capture_output=True)
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    assert entries[:2] == first
    assert len({entry["id"] for entry in entries}) == 3
    assert sum(entry["verdict"] == "found" for entry in entries) >= 2
    assert all("tests/test_bootstrap.py::" in entry["by"] for entry in entries if entry["verdict"] == "found")
