"""Markdown written for the repository, read as pages of the site: links are moved, and blocks get the blank lines that
Python-Markdown needs and GitHub does not."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

CODE = r"(?P<code>(?P<ticks>`+)(?:(?!\n\n).)+?(?P=ticks))"  # within one paragraph
LINK = re.compile(
    CODE + r"|(?P<label>!?\[[^\]]*\])\((?P<target>[^)\s]+)(?P<title>[^)]*)\)|\]\[(?P<reference>[^\]]+)\]", re.DOTALL
)
DEFINITION = re.compile(r"^\[([^\]]+)\]:", re.MULTILINE)
FENCE = re.compile(r"\s*(```|~~~)")
ELSEWHERE = re.compile(
    r"[a-z][a-z0-9+.-]*:|/|#", re.IGNORECASE
)  # an address, a path from the top, a place on this page
ITEM = re.compile(r"([-*+]|1[.)]) ")


def rewrite_links(text: str, source: str, outside: Mapping[str, str], root: Path) -> tuple[str, list[str]]:
    """The text of ``source`` with relative links as the site needs them, and the targets that do not exist.

    A link to a page of the site leads to that page. A link to any other file of the repository, such as a config,
    keeps its words and is no link: the site does not have that file.

    Args:
        text: Markdown.
        source: its path in the repository, with forward slashes.
        outside: paths in the repository of pages that do not lie under ``docs/``: their paths in the site.
        root: the repository.
    """
    missing: list[str] = []
    defined = set(DEFINITION.findall(text))

    def moved(link: re.Match[str]) -> str:
        if link["reference"]:  # [A][B] without a definition of B is text on GitHub, and names an object here
            return link[0] if link["reference"] in defined else f"]\\[{link['reference']}]"
        if link["code"] or ELSEWHERE.match(link["target"]):
            return link[0]
        path, hash_mark, anchor = link["target"].partition("#")
        there = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if not (root / there).exists():
            missing.append(link["target"])
            return link[0]
        page = _place(there, outside)
        if page is None:
            return link["label"].removeprefix("!")[1:-1]
        relative = posixpath.relpath(page, posixpath.dirname(_place(source, outside) or "") or ".")
        return f"{link['label']}({relative}{hash_mark}{anchor}{link['title']})"

    written: list[str] = []
    for code, lines in groupby(_lines(text), key=lambda pair: pair[1]):  # a link may go on in the next line
        block = "\n".join(line for line, _ in lines)
        written.append(block if code else LINK.sub(moved, block))
    return "\n".join(written), missing


def separate_blocks(text: str) -> str:
    """A blank line before each table and list that follows a paragraph at once."""
    separated: list[str] = []
    before = ""
    for line, code in _lines(text):
        paragraph = bool(before) and not before.startswith((" ", "|", "#", ">")) and not ITEM.match(before)
        if not code and paragraph and (line.startswith("|") or ITEM.match(line)):
            separated.append("")
        separated.append(line)
        before = line if not code else ""
    return "\n".join(separated)


def _place(path: str, outside: Mapping[str, str]) -> str | None:
    """Where a file of the repository is in the site, or None when it is not there."""
    return outside.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)


def _lines(text: str) -> list[tuple[str, bool]]:
    """Every line, and whether it belongs to a fenced block of code."""
    marked: list[tuple[str, bool]] = []
    open_fence = ""
    for line in text.split("\n"):
        fence = FENCE.match(line)
        marked.append((line, bool(fence or open_fence)))
        if fence and not open_fence:
            open_fence = fence[1]
        elif fence and fence[1] == open_fence:
            open_fence = ""
    return marked
