"""The API reference: one page for each package, with the docstrings of its public modules. Read from source alone;
nothing of the package is imported."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROLE = re.compile(r":[a-z]+:(?=`)")  # :func:`name` names the kind of a thing; a table needs its name alone


def packages(folder: Path) -> dict[str, Path]:
    """``folder`` and every package in it, by dotted name, the outer ones first; links to folders are followed."""
    return _packages(folder, folder.name)


def _packages(folder: Path, name: str) -> dict[str, Path]:
    if not (folder / "__init__.py").is_file():
        return {}
    within = {name: folder}
    for child in sorted(folder.iterdir()):
        if child.is_dir() and not child.name.startswith("_"):
            within |= _packages(child, f"{name}.{child.name}")
    return within


def package_page(name: str, folder: Path) -> str:
    """Markdown with mkdocstrings' directives: the package's own docstring, then its public modules."""
    parts = [
        f"# `{name}`",
        f"::: {name}\n    options:\n      members: false\n      show_root_heading: false",
    ]
    modules = sorted(path.stem for path in folder.glob("*.py") if not path.name.startswith("_"))
    parts += [f"::: {name}.{module}\n    options:\n      heading_level: 2" for module in modules]
    return "\n\n".join(parts) + "\n"


def index_page(folders: dict[str, Path]) -> str:
    """A table of all packages, each with the first paragraph of its docstring."""
    rows = [f"| [{name}]({name}.md) | {_statement(folder)} |" for name, folder in folders.items()]
    return "\n".join(
        [
            "# API reference",
            "",
            "Every folder of the package has a page. The names that `import kvopt` offers are those of",
            "[`kvopt.api`][kvopt.api].",
            "",
            "| folder | holds |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def _statement(folder: Path) -> str:
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8"))) or ""
    return ROLE.sub("", " ".join(docstring.split("\n\n")[0].split())).replace("|", "\\|")
