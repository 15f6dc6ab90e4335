"""The pages of docs/ name files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = "kvopt|kernels|train|tools|tests|configs"
PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "kernels/README.md",
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_file_of_the_project_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", page.read_text("utf-8"))
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_walks_through_the_code_name_functions_that_their_files_define() -> None:
    text = (ROOT / "docs/architecture.md").read_text("utf-8")
    pairs = [
        *((path, name) for path, name in re.findall(r"`([\w/]+\.py)` \(`(\w+)`\)", text)),
        *((path, name) for name, path in re.findall(r"`(\w+)` \(`([\w/]+\.py)`\)", text)),
    ]
    assert len(pairs) >= 10
    missing = [
        (path, name)
        for path, name in pairs
        if not re.search(rf"^(def|class) {name}\b", (ROOT / path).read_text("utf-8"), flags=re.M)
    ]
    assert missing == []
