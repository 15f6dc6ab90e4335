"""The folders and which way their imports run (``docs/architecture.md``), read from the source; and what loads what."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = (
    "version", "errors", "kernels", "storage", "console", "config", "documents", "task", "base", "contexts", "mutate",
    "measure", "shorten", "learning", "report", "run", "export", "train", "bench", "api", "cli",
)  # fmt: skip
"""A folder imports only itself and what stands before it."""
FACE = {"__init__.py", "__main__.py", "api.py", "errors.py", "version.py", "py.typed"}
"""All that ``kvopt/`` itself may hold beside folders."""
FAMILIES = (
    "kvopt/config",
    "kvopt/documents",
    "mutate/operators",
    "mutate/generators",
    "learning/starts",
    "export/formats",
    "export/scripts",
    "losses",
    "schedules",
    "metrics",
    "divergences",
    "report/pictures",
)
"""Folders with one small file a member."""
LONGEST, SHORTEST = 400, 30


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    named = {}
    for top, package in (
        (ROOT / "kvopt", "kvopt"),
        (ROOT / "kernels", "kvopt.kernels"),
        (ROOT / "train", "kvopt.train"),
    ):
        for path in sorted(top.rglob("*.py")):
            parts = path.relative_to(top).with_suffix("").parts
            if package == "kvopt" and parts[0] in ("kernels", "train"):
                continue  # links to the folders at the top
            named[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return named


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that a file imports, anywhere in it, under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "kvopt")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kvopt":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else str(node.module)


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "api"  # ``import kvopt`` is the face


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: set(imports(path, known)) - {name} for name, path in known.items()}


def test_every_folder_has_its_place() -> None:
    folders = {path.name for path in (ROOT / "kvopt").iterdir() if path.is_dir() and (path / "__init__.py").is_file()}
    assert folders <= set(ROOMS)
    files = {path.name for path in (ROOT / "kvopt").iterdir() if path.is_file()}
    assert files == FACE


def test_imports_run_one_way(graph: dict[str, set[str]]) -> None:
    place = {name: position for position, name in enumerate(ROOMS)}
    back = [
        f"{module} imports {target}"
        for module, targets in graph.items()
        for target in targets
        if module not in ("kvopt", "kvopt.__main__") and place[room(target)] > place[room(module)]
    ]
    assert not back


def test_no_modules_import_each_other_in_a_circle(graph: dict[str, set[str]]) -> None:
    """An import inside a function counts: it would only hide a circle."""
    graph = {name: {t for t in targets if t in graph} for name, targets in graph.items() if name != "kvopt"}
    while leaves := {name for name, targets in graph.items() if not targets & graph.keys()}:
        graph = {name: targets for name, targets in graph.items() if name not in leaves}
    assert not graph, "these modules, or what they import, stand in a circle"


@pytest.mark.parametrize("folder", [name for name in ROOMS if name not in ("version", "errors", "api")])
def test_a_folder_says_in_one_statement_what_it_holds(folder: str) -> None:
    top = ROOT / folder if folder in ("kernels", "train") else ROOT / "kvopt" / folder
    text = ast.get_docstring(ast.parse((top / "__init__.py").read_text("utf-8")))
    assert text
    assert text.split("\n\n")[0].rstrip().endswith((".", ":"))


def test_files_are_neither_long_nor_crumbs() -> None:
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in modules().values()}
    assert not [f"{path}: {n}" for path, n in lengths.items() if n > LONGEST]
    crumbs = [
        path
        for path, n in lengths.items()
        if n < SHORTEST and path.name not in {"__init__.py", "__main__.py", *FACE}
        and not any(f"/{family}/" in path.as_posix() for family in FAMILIES)
    ]  # fmt: skip
    assert not crumbs


def test_no_two_modules_or_public_classes_share_a_name() -> None:
    """But for those in :data:`SAME`, which are one idea in two folders."""
    names = Counter(name.rpartition(".")[2] for name, path in modules().items() if path.name != "__init__.py")
    assert {name for name, count in names.items() if count > 1} <= SAME_MODULES
    classes: Counter[str] = Counter()
    for path in modules().values():
        tree = ast.parse(path.read_text("utf-8"))
        classes.update(node.name for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_")
    assert {name for name, count in classes.items() if count > 1} <= SAME_CLASSES


SAME_MODULES = {
    "__main__",
    "contexts", "evaluation", "sequence", "students", "study",  # one idea: its section, its command, its view or stage
    "tables",  # the tables on a terminal of each thing that has some
    "generate", "prompt_embeds",  # the script in an export, by the name of what it does there
}  # fmt: skip
SAME_CLASSES: set[str] = set()


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import kvopt", ("torch", "pydantic", "typer")),
        ("import kvopt.config.document", ("torch", "transformers", "peft", "scipy", "numpy")),
        ("import kvopt.cli", ("torch", "transformers", "peft", "scipy", "pydantic")),
        ("import kvopt.report.reading", ("torch", "transformers", "peft")),
        # what kvopt validate needs of transformers is a tokenizer
        (
            "import kvopt.run.validate, kvopt.train.early_checks",
            ("transformers.modeling_utils", "torch._dynamo", "peft"),
        ),
    ],
)
def test_what_is_looked_at_first_loads_nothing_heavy(code: str, absent: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint([m for m in {absent!r} if m in sys.modules])"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
