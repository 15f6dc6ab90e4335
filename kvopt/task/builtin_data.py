"""The built-in data: short functions of the running Python's own standard library and what their docstrings say.

The inputs V are functions without their docstring, the outputs Y the docstrings' first lines. Sources are read and
parsed, never imported, so the choice depends on the installed files alone. Modules are divided by a hash of their name:
no validation function comes from a module that is trained on.
"""

from __future__ import annotations

import ast
import os
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol, TypeVar

from kvopt.errors import InputError
from kvopt.storage.files import sha256_bytes

BUILTIN_NAME = "stdlib-docstrings"
MAX_LINES = 12
MAX_PER_MODULE = 8
VALIDATION_SHARE = 0.25
SKIPPED_FOLDERS = """
test tests idle_test idlelib lib2to3 site-packages dist-packages turtledemo ensurepip _vendor pip distutils setuptools
tkinter encodings __pycache__ lib-dynload pydoc_data __phello__
"""
SKIPPED_MODULES = "antigravity this turtle _pydecimal sre_compile sre_parse sre_constants"

Function = ast.FunctionDef | ast.AsyncFunctionDef
SUMMARY = re.compile(r"[A-Z][a-z]+ [ -_a-~]*[A-Za-z0-9)'\"]\.")
# first words that stand in the imperative
VERBS = """
Abort Accept Acquire Activate Add Adjust Advance Allocate Allow Append Apply Arrange Assert Assign Attach Begin Bind
Block Build Calculate Call Cancel Change Check Choose Clean Clear Clone Close Collapse Collect Combine Compare Compile
Compress Compute Configure Connect Construct Consume Convert Copy Count Create Customize Decide Decode Decrement
Define Delete Detach Determine Disable Disassemble Discard Dispatch Display Divide Drop Dump Edit Emit Enable Encode
Enqueue Ensure Enter Escape Evaluate Examine Execute Exit Expand Extract Feed Fetch Fill Filter Find Finish Flush Fold
Force Forget Format Free Generate Get Guess Handle Hash Indicate Inherit Initialize Insert Inspect Install Instantiate
Interpret Invoke Issue Iterate Join Keep Kill Leave List Load Locate Lock Log Look Make Map Mark Match Merge Modify
Move Multiply Normalize Notify Obtain Omit Open Parse Patch Pause Perform Pop Prepare Prepend Preserve Print Process
Produce Provide Prune Push Put Query Quote Raise Rank Read Receive Recognize Record Reduce Register Release Reload
Remove Rename Render Reorder Replace Report Represent Request Reset Resize Resolve Restore Resume Retrieve Return
Reverse Rewind Run Save Scan Schedule Search Seek Select Send Separate Serve Set Show Shuffle Signal Skip Sort Split
Start Stop Store Strip Subscribe Subtract Sum Suspend Switch Take Tell Terminate Test Tokenize Transform Translate
Traverse Trigger Truncate Turn Unescape Unlock Unpack Unregister Unset Update Upgrade Use Validate Verify Visit Wait
Wake Walk Wrap Write Yield
"""


@dataclass(frozen=True)
class StdlibFunction:
    """``code`` without its docstring, the docstring's first line, and the place (``"textwrap.py:442"``)."""

    code: str
    docstring: str
    where: str


def stdlib_docstrings(part: str, root: Path | None = None) -> list[StdlibFunction]:
    """The functions of one part, ``"train"`` or ``"validation"``, in an order that mixes modules and never changes.

    Args:
        part: which of the two; they share no module, no code and no docstring.
        root: the library's folder; by default the running Python's.

    Raises:
        InputError: when this Python keeps no readable sources.
    """
    return of_part(part, _chosen, root)


@lru_cache(maxsize=2)
def _chosen(root: Path) -> tuple[tuple[bool, StdlibFunction], ...]:
    """The functions of both parts with whether they are for validation: no code and no docstring comes twice."""
    return mixed(root, _functions, MAX_PER_MODULE, _what_must_differ)


def _what_must_differ(function: StdlibFunction) -> list[tuple[str, str]]:
    return [("code", function.code), ("docstring", function.docstring)]


class HasCode(Protocol):
    """An example with the code that its place in the order follows from."""

    @property
    def code(self) -> str: ...


Found = TypeVar("Found", bound=HasCode)


def of_part(
    part: str, chosen: Callable[[Path], tuple[tuple[bool, Found], ...]], root: Path | None = None
) -> list[Found]:
    """The examples of one part, ``"train"`` or ``"validation"``, of those that ``chosen`` finds in the library's
    folder. Raises InputError when this Python keeps no readable sources.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    examples = [one for is_validation, one in chosen(root) if is_validation == (part == "validation")]
    if not examples:
        raise InputError("this Python has no library sources", where=str(root), fix="use data files of your own")
    return examples


def mixed(
    root: Path,
    found: Callable[[Path, str], Iterator[Found]],
    most: int,
    distinct: Callable[[Found], Collection[tuple[str, str]]],
) -> tuple[tuple[bool, Found], ...]:
    """Examples of all modules with whether they are for validation, in an order that mixes modules and never changes.

    Args:
        found: those of one file, given its path and its name in ``root``.
        most: of one module.
        distinct: what must not come twice.
    """
    chosen: list[tuple[str, str, Found]] = []
    for path in sources(root):
        name = path.relative_to(root).as_posix()
        examples = sorted(found(path, name), key=lambda one: stable_hash(one.code))
        chosen += [(stable_hash("order", name, one.code), name, one) for one in examples[:most]]
    seen: set[tuple[str, str]] = set()
    result = []
    for _, name, one in sorted(chosen, key=lambda item: item[:2]):
        if seen.isdisjoint(distinct(one)):
            seen.update(distinct(one))
            result.append((_in_validation(name), one))
    return tuple(result)


def stable_hash(*parts: str) -> str:
    """The same for the same parts, whatever runs it."""
    return sha256_bytes("\0".join(parts).encode("utf-8", "surrogatepass"))


def _in_validation(module: str) -> bool:
    return int(stable_hash("validation", module)[:8], 16) / 2**32 < VALIDATION_SHARE


def sources(root: Path) -> list[Path]:
    """The library's files that functions are taken from."""
    skipped_folders, skipped_modules = set(SKIPPED_FOLDERS.split()), set(SKIPPED_MODULES.split())
    paths = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in skipped_folders]
        for name in files:
            stem, suffix = os.path.splitext(name)
            if suffix == ".py" and stem not in skipped_modules and "test" not in stem:
                paths.append(Path(folder, name))
    return sorted(paths)


def parsed(path: Path) -> tuple[ast.Module, list[str]]:
    """A source's tree and lines; an empty tree where it cannot be read."""
    try:
        text = path.read_text("utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text), text.split("\n")
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError):
        return ast.Module([], []), []


def _functions(path: Path, name: str) -> Iterator[StdlibFunction]:
    """The usable functions of one file: at module level and in its classes."""
    tree, lines = parsed(path)
    for node in definitions(tree):
        summary = _summary(node)
        code = _code_without_docstring(node, lines) if summary else None
        if summary and code:
            yield StdlibFunction(code, summary, f"{name}:{node.lineno}")


def definitions(tree: ast.Module) -> Iterator[Function]:
    """Functions at module level and in its classes."""
    for node in tree.body:
        for inner in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(inner, Function):
                yield inner


def _summary(node: Function) -> str | None:
    """The docstring's first line if it is one plain sentence that obeys the demo's template, else None."""
    head, _, body = (ast.get_docstring(node) or "").partition("\n")
    head = head.strip()
    first = head.split(" ")[0]
    complete = not body or not body.split("\n")[0].strip()
    plain = SUMMARY.fullmatch(head) and not re.search(r"`|\*|: |\. [A-Z]|  |<|\b(XXX|TODO)\b|deprecated", head)
    return (
        head
        if complete and first in VERBS.split() and plain and 15 <= len(head) <= 90 and head.count(" ") < 15
        else None
    )


def _code_without_docstring(node: Function, lines: list[str]) -> str | None:
    """The function's source, dedented, if it is short, says something and can be cut cleanly."""
    docstring, body = node.body[0], node.body[1:]
    start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    end, cut = node.end_lineno or 0, docstring.end_lineno or 0
    if not body or end - start - (cut - docstring.lineno) > MAX_LINES + 1:
        return None
    if docstring.lineno <= _header_end(node) or body[0].lineno <= cut or _has_long_string(body):
        return None
    after = lines[cut:end]
    while after and not after[0].strip():
        after.pop(0)
    code = textwrap.dedent("\n".join(line.rstrip() for line in lines[start - 1 : docstring.lineno - 1] + after))
    usable = code.count("\n") < MAX_LINES and "\t" not in code and "\x0c" not in code and code.isascii()
    return code if usable and _says_something(body, code) else None


def _header_end(node: Function) -> int:
    """The last line of the signature, as far as the tree knows."""
    inside: list[ast.arg | ast.expr] = [*node.args.args, *node.args.kwonlyargs, *node.args.defaults]
    ends = [part.end_lineno or 0 for part in inside]
    return max([node.lineno, *ends])


def _has_long_string(body: list[ast.stmt]) -> bool:
    """Whether a string runs over several lines: moving the code to the left would change it."""
    strings = [n for statement in body for n in ast.walk(statement) if isinstance(n, ast.Constant | ast.JoinedStr)]
    return any(string.end_lineno != string.lineno for string in strings)


def _says_something(body: list[ast.stmt], code: str) -> bool:
    trivial = isinstance(body[0], ast.Pass | ast.Raise) or (
        isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    )
    return not trivial and len(code) >= 60 and max(map(len, code.split("\n"))) <= 100
