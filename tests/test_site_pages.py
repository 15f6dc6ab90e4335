"""The site's pages from files of the repository: what becomes of links, blocks of Markdown, and the API reference."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parents[1] / "tools" / "site"
OUTSIDE = {"README.md": "index.md", "kernels/README.md": "kernels/index.md"}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"site_{name}", TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


links = load("repository_links")
api_pages = load("api_pages")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for name in ("README.md", "kernels/README.md", "docs/limits.md", "docs/report.png", "configs/demo.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("source", "text", "expected"),
    [
        ("README.md", "[Limits](docs/limits.md#gpu)", "[Limits](limits.md#gpu)"),
        ("README.md", "![Page](docs/report.png)", "![Page](report.png)"),
        ("README.md", "[op](kernels/README.md)", "[op](kernels/index.md)"),
        ("kernels/README.md", "[home](../README.md)", "[home](../index.md)"),
        ("kernels/README.md", '[Limits](../docs/limits.md "title")', '[Limits](../limits.md "title")'),
        ("docs/limits.md", "[op](../kernels/README.md)", "[op](kernels/index.md)"),
        ("README.md", "a [config](configs/demo.yaml) that the site lacks", "a config that the site lacks"),
        ("README.md", "[a](https://example.org/b.md) [c](#d)", "[a](https://example.org/b.md) [c](#d)"),
        ("README.md", "`[a](docs/limits.md)`", "`[a](docs/limits.md)`"),
        ("README.md", "```\n[a](docs/limits.md)\n```", "```\n[a](docs/limits.md)\n```"),
        ("README.md", "[two\nlines](docs/limits.md)", "[two\nlines](limits.md)"),
        ("README.md", "`two\n[lines](docs/limits.md)`", "`two\n[lines](docs/limits.md)`"),
        ("README.md", "NAME[:CONFIG][:SPLIT]", "NAME[:CONFIG]\\[:SPLIT]"),
        ("README.md", "[a][b]\n\n[b]: https://example.org", "[a][b]\n\n[b]: https://example.org"),
    ],
)
def test_links_lead_to_pages_of_the_site(repository: Path, source: str, text: str, expected: str) -> None:
    assert links.rewrite_links(text, source, OUTSIDE, repository) == (expected, [])


def test_a_link_to_no_file_is_reported(repository: Path) -> None:
    text, missing = links.rewrite_links("[a](docs/gone.md)", "README.md", OUTSIDE, repository)
    assert (text, missing) == ("[a](docs/gone.md)", ["docs/gone.md"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Words:\n| a | b |\n|---|---|", "Words:\n\n| a | b |\n|---|---|"),
        ("Words:\n- a\n- b", "Words:\n\n- a\n- b"),
        ("- a\n  more of a\n- b", "- a\n  more of a\n- b"),
        ("```\nwords\n- a\n```", "```\nwords\n- a\n```"),
        ("- a\n- b\n\nwords", "- a\n- b\n\nwords"),
    ],
)
def test_tables_and_lists_are_set_apart_from_paragraphs(text: str, expected: str) -> None:
    assert links.separate_blocks(text) == expected


def test_every_package_has_a_page_with_its_public_modules(tmp_path: Path) -> None:
    package, linked = tmp_path / "outer", tmp_path / "elsewhere"
    for folder in (package, package / "inner", package / "_private", linked):
        folder.mkdir()
        (folder / "__init__.py").write_text('"""What :func:`f` of\nit is. More.\n\nAnd more."""\n')
    (package / "templates").mkdir()  # not a package
    (package / "linked").symlink_to(linked)
    for name in ("one.py", "_two.py", "__main__.py"):
        (package / name).write_text("")

    pages = api_pages.packages(package)
    assert list(pages) == ["outer", "outer.inner", "outer.linked"]
    page = api_pages.package_page("outer", package)
    assert [line for line in page.splitlines() if line.startswith(":::")] == ["::: outer", "::: outer.one"]
    assert "| [outer.linked](outer.linked.md) | What `f` of it is. More. |" in api_pages.index_page(pages)
