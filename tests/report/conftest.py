"""A hand-made run directory for the tests of the report."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.made import write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory to read and to change."""
    return write_run(tmp_path / "run")
