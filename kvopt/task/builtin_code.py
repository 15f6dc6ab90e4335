"""Built-in data with long outputs: functions and classes of the running Python's own standard library, to be written
from their signature and docstring.

The inputs V are the signature (with decorators) and the docstring, the outputs Y the code that follows: 3,300 to 12,000
characters, some 900 to 4,000 tokens. Sources are read and parsed, never imported. Modules are divided as for the
docstrings (:mod:`kvopt.task.builtin_data`): nothing for validation comes from a module that is trained on.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from kvopt.task.builtin_data import mixed, of_part, parsed

CODE_NAME = "stdlib-code"
SHORTEST, LONGEST = 3_300, 12_000
"""Characters of an output."""
LONGEST_INPUT = 2_000
MAX_PER_MODULE = 4


@dataclass(frozen=True)
class StdlibCode:
    """``signature`` (to its colon) and ``docstring``, the ``code`` after them, dedented, and the place."""

    signature: str
    docstring: str
    code: str
    where: str


def stdlib_code(part: str, root: Path | None = None) -> list[StdlibCode]:
    """What is to be written in one part, ``"train"`` or ``"validation"``, in an order that mixes modules.

    Args:
        part: which of the two.
        root: the library's folder; by default the running Python's.

    Raises:
        InputError: when this Python keeps no readable sources.
    """
    return of_part(part, _chosen, root)


@lru_cache(maxsize=2)
def _chosen(root: Path) -> tuple[tuple[bool, StdlibCode], ...]:
    return mixed(root, _found, MAX_PER_MODULE, lambda one: [("code", one.code)])


def _found(path: Path, name: str) -> Iterator[StdlibCode]:
    tree, lines = parsed(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(node):
            one = _parted(node, lines, f"{name}:{node.lineno}")
            if one is not None:
                yield one


def _parted(
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, lines: list[str], where: str
) -> StdlibCode | None:
    """The definition cut after its docstring; None where it is too short, too long, or cannot be cut between lines."""
    docstring, body = node.body[0], node.body[1:]
    cut, end = docstring.end_lineno or 0, node.end_lineno or 0
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    if not body or body[0].lineno <= cut or docstring.lineno <= node.lineno:
        return None
    code = textwrap.dedent("\n".join(line.rstrip() for line in lines[cut:end])).strip("\n")
    signature = textwrap.dedent("\n".join(lines[start - 1 : docstring.lineno - 1])).rstrip()
    said = ast.get_docstring(node) or ""
    plain = (
        code.isascii()
        and not code[:1].isspace()
        and "\t" not in code
        and "\x0c" not in code
        and signature.endswith(":")
    )
    fits = SHORTEST <= len(code) <= LONGEST and len(signature) + len(said) <= LONGEST_INPUT
    return StdlibCode(signature, said, code, where) if plain and fits else None
