"""MkDocs hooks of the documentation site: pages that are not files under ``docs/``.

Two kinds of page are added. Markdown files that live elsewhere in the repository (``README.md``, ``kernels/README.md``)
are read where they are, so that they stand once. The API reference has a page for each folder of the package, found by
walking it, so that moving a module needs no edit here.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from api_pages import index_page, package_page, packages
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from repository_links import rewrite_links, separate_blocks

log = logging.getLogger("mkdocs.hooks.kvopt")  # a warning here makes ``mkdocs build --strict`` fail

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "kvopt"
REFERENCE = "reference"  # the folder of the API reference in the site, and its entry in the nav of mkdocs.yml

OUTSIDE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "kernels/README.md": "kernels/index.md",
    "kernels/RESULTS.md": "kernels/results.md",
}
"""Markdown files outside docs/, by their path in the repository: the path that each has in the site."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of the API reference into the nav, where mkdocs.yml names their index."""
    index = f"{REFERENCE}/index.md"
    pages: list[Any] = [index, *({name: _reference_path(name)} for name in packages(PACKAGE))]
    assert config.nav is not None, "mkdocs.yml has a nav"
    entries = [entry for item in config.nav for entry in item.items()]
    config.nav = [{title: pages if target == index else target} for title, target in entries]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the Markdown files from outside docs/ and the API reference."""
    for source, target in OUTSIDE.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    folders = packages(PACKAGE)
    files.append(File.generated(config, f"{REFERENCE}/index.md", content=index_page(folders)))
    for name, folder in folders.items():
        files.append(File.generated(config, _reference_path(name), content=package_page(name, folder)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between files of the repository become links between pages of the site."""
    if page.file.abs_src_path is None:  # the API reference is written for the site
        return markdown
    source = Path(page.file.abs_src_path).relative_to(ROOT)
    text, missing = rewrite_links(separate_blocks(markdown), source.as_posix(), OUTSIDE, ROOT)
    for target in missing:
        log.warning("%s: the link to %s leads nowhere", source, target)
    return text


def _reference_path(package: str) -> str:
    return f"{REFERENCE}/{package}.md"
