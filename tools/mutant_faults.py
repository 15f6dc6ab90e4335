"""The faults that ``mutants.py`` puts into a module: other operators, constants, branches, arguments and results, and
elements and statements that are left out.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from dataclasses import dataclass

SWAPS = {
    ast.Lt: ("<", ("<=", ">=")), ast.LtE: ("<=", ("<", ">")), ast.Gt: (">", (">=", "<=")), ast.GtE: (">=", (">", "<")),
    ast.Eq: ("==", ("!=",)), ast.NotEq: ("!=", ("==",)), ast.In: ("in", ("not in",)), ast.NotIn: ("not in", ("in",)),
    ast.Is: ("is", ("is not",)), ast.IsNot: ("is not", ("is",)), ast.Add: ("+", ("-",)), ast.Sub: ("-", ("+",)),
    ast.Mult: ("*", ("/",)), ast.Div: ("/", ("*",)), ast.FloorDiv: ("//", ("%",)), ast.Mod: ("%", ("//",)),
    ast.BitOr: ("|", ("&",)), ast.BitAnd: ("&", ("|",)), ast.And: ("and", ("or",)), ast.Or: ("or", ("and",)),
}  # fmt: skip
SYMMETRIC = {"min", "max", "equal"}
GUARDS = {"strict", "frozen", "description"}
"""Keyword arguments that only raise where the code is wrong already, or are words."""
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "argmin": "argmax", "argmax": "argmin"}


@dataclass(frozen=True)
class Mutant:
    """One fault: bytes ``start`` to ``end`` of a module become ``text``."""

    module: str
    kind: str
    line: int
    start: int
    end: int
    text: str

    def applied(self, source: bytes) -> bytes:
        return source[: self.start] + self.text.encode() + source[self.end :]

    def diff(self, source: bytes) -> tuple[str, str]:
        """What it changes, from the first line to the last: before and after."""
        first = source.rfind(b"\n", 0, self.start) + 1
        last = source.find(b"\n", self.end)
        after = source[first : self.start] + self.text.encode() + source[self.end : last]
        return source[first:last].decode(), after.decode()

    def id(self, source: bytes) -> str:
        """The same for the same change, wherever its lines have moved."""
        before, after = self.diff(source)
        earlier = source[: self.start].count(before.encode())  # the same lines further up
        change = [self.module, before, after, *([earlier] if earlier else [])]
        return hashlib.sha256(json.dumps(change).encode()).hexdigest()[:10]


class Mutants(ast.NodeVisitor):
    """All faults of a module, in the order of its text. Annotations, docstrings and messages of errors stay."""

    def __init__(self, module: str, source: bytes) -> None:
        self.module, self.source, self.found = module, source, []
        self.lines = [0]
        for line in source.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))
        self.visit(ast.parse(source))

    def place(self, node: ast.AST) -> tuple[int, int]:
        start, end = (
            self.lines[node.lineno - 1] + node.col_offset,
            self.lines[node.end_lineno - 1] + node.end_col_offset,
        )
        return start, end

    def text(self, node: ast.AST) -> str:
        start, end = self.place(node)
        return self.source[start:end].decode()

    def add(self, kind: str, line: int, start: int, end: int, text: str) -> None:
        mutant = Mutant(self.module, kind, line, start, end, text)
        try:
            changed = ast.parse(mutant.applied(self.source))
        except SyntaxError:
            return
        if ast.dump(changed) != ast.dump(ast.parse(self.source)):
            self.found.append(mutant)

    def replace(self, kind: str, node: ast.AST, text: str) -> None:
        self.add(kind, node.lineno, *self.place(node), text)

    def swap(self, kind: str, left: ast.AST, operator: ast.AST, right: ast.AST) -> None:
        """Another operator between two operands."""
        start, end = self.place(left)[1], self.place(right)[0]
        sign, others = SWAPS.get(type(operator), ("", ()))
        between = self.source[start:end].decode()
        for other in others:
            self.add(
                kind, left.end_lineno, start, end, re.sub(rf"(?<!\w){re.escape(sign)}(?!\w)", other, between, count=1)
            )

    def drop(self, kind: str, node: ast.AST) -> None:
        """An element of a list of things, with its comma."""
        start, end = self.place(node)
        if comma := re.match(rb"\s*,\s*", self.source[end:]):
            end += comma.end()
        elif comma := re.search(rb",\s*\Z", self.source[:start]):
            start = comma.start()
        self.add(kind, node.lineno, start, end, "")

    # ---- what is left as it is

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass  # before Python 3.12 the parts have no places

    def visit_Raise(self, node: ast.Raise) -> None:
        self.replace("statement", node, "pass")

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for default in (*node.args.defaults, *(d for d in node.args.kw_defaults if d is not None)):
            self.visit(default)
        for statement in node.body:
            self.visit(statement)

    # ---- expressions

    def visit_Compare(self, node: ast.Compare) -> None:
        for left, operator, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
            self.swap("comparison", left, operator, right)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        self.swap("arithmetic", node.left, node.op, node.right)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self.swap("logic", node.values[0], node.op, node.values[1])
        for value in node.values[1:]:
            start = self.place(node.values[node.values.index(value) - 1])[1]
            tail = self.source[start : self.place(value)[1]].decode()
            if tail.count("(") == tail.count(")"):
                self.add("logic", value.lineno, start, self.place(value)[1], "")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        self.replace("sign", node, self.text(node.operand))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self.replace("constant", node, str(not value))
        elif isinstance(value, int):
            self.replace("constant", node, str(value + 1))
            self.replace("constant", node, str(value - 1))
        elif isinstance(value, float):
            self.replace("constant", node, repr(value * 2 or 1.0))

    def visit_keyword(self, node: ast.keyword) -> None:
        if node.arg not in GUARDS:
            self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        name = ""
        if isinstance(node.func, ast.Name | ast.Attribute):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if other := NAMES.get(name):
                end = self.place(node.func)[1]
                self.add("function", node.func.end_lineno, end - len(name), end, other)
        for one, two in zip(node.args, node.args[1:], strict=False):
            if name not in SYMMETRIC and not isinstance(one, ast.Starred) and not isinstance(two, ast.Starred):
                between = self.source[self.place(one)[1] : self.place(two)[0]].decode()
                span = self.place(one)[0], self.place(two)[1]
                self.add("arguments", one.lineno, *span, self.text(two) + between + self.text(one))
        for keyword in node.keywords:
            if keyword.arg not in GUARDS:
                self.drop("argument", keyword)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.replace("branch", node.test, f"(not ({self.text(node.test)}))")
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self.replace("filter", test, "True")
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.visit(node.value)
        if isinstance(node.slice, ast.Tuple):
            for part in node.slice.elts:
                self.visit(part)
        else:
            self.visit(node.slice)

    def elements(self, node: ast.List | ast.Tuple | ast.Set) -> None:
        if len(node.elts) > 1 and isinstance(getattr(node, "ctx", ast.Load()), ast.Load):
            for element in node.elts:
                self.drop("element", element)
        self.generic_visit(node)

    visit_List = visit_Tuple = visit_Set = elements

    def visit_Dict(self, node: ast.Dict) -> None:
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                self.replace("key", key, repr(key.value + "_"))
            self.visit(value)

    # ---- statements

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" in self.text(node.test):
            return
        self.replace("condition", node.test, f"not ({self.text(node.test)})")
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):
            return  # a docstring
        self.replace("statement", node, "pass")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.replace("statement", node, "pass")
        self.swap("arithmetic", node.target, node.op, node.value)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if isinstance(node.value, ast.Subscript) and node.col_offset == 0:
            return  # a name for a type
        if not isinstance(node.targets[0], ast.Name | ast.Tuple):
            self.replace("statement", node, "pass")
        self.visit(node.value)

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
            self.replace("result", node, "return None")
            self.visit(node.value)

    def visit_Break(self, node: ast.Break | ast.Continue) -> None:
        self.replace("statement", node, "pass")

    visit_Continue = visit_Break
