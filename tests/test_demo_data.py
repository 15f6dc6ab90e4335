"""The built-in data: what the running Python's own library must always yield, and what is cut out of a source."""

import ast
import re

import pytest

from kvopt.errors import InputError
from kvopt.task.builtin_data import MAX_LINES, MAX_PER_MODULE, stdlib_docstrings


@pytest.fixture(scope="module")
def parts():
    return {part: stdlib_docstrings(part) for part in ("train", "validation")}


def module(function):
    return function.where.rsplit(":", 1)[0]


def test_there_are_a_few_hundred_functions(parts):
    assert 352 <= len(parts["train"]) <= 800
    assert 100 <= len(parts["validation"]) <= 400


def test_validation_shares_no_module_code_or_docstring_with_training(parts):
    for key in (module, lambda f: f.code, lambda f: f.docstring):
        assert {key(f) for f in parts["train"]}.isdisjoint({key(f) for f in parts["validation"]})


def test_no_code_and_no_docstring_comes_twice(parts):
    everything = parts["train"] + parts["validation"]
    assert len({f.code for f in everything}) == len({f.docstring for f in everything}) == len(everything)


def test_codes_are_short_functions_without_a_docstring(parts):
    for function in parts["train"] + parts["validation"]:
        (node,) = ast.parse(function.code).body
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(node) is None
        assert len(function.code.split("\n")) <= MAX_LINES
        assert function.docstring not in function.code


def test_docstrings_obey_the_rules_of_the_demo_template(parts):
    for function in parts["train"] + parts["validation"]:
        assert re.fullmatch(r"[A-Z][a-z]+ [^`\n]+[^.]\.", function.docstring)
        assert 15 <= len(function.docstring) <= 90
        assert len(function.docstring.split()) <= 15


def test_modules_are_mixed_and_none_dominates(parts):
    functions = parts["train"]
    counts = {name: [module(f) for f in functions].count(name) for name in map(module, functions)}
    assert max(counts.values()) <= MAX_PER_MODULE
    assert len({module(f) for f in functions[:64]}) >= 32


def test_no_function_comes_from_tests_or_installed_packages(parts):
    for function in parts["train"] + parts["validation"]:
        assert not re.search(r"site-packages|(^|/)tests?/|test_|idlelib|lib2to3|tkinter", function.where)


LIBRARY = '''
def documented(items, default=None):
    """Return the first item of a list.

    More about it.
    """

    if items:
        return items[0]
    return default


class Box:
    @property
    def size(self):
        # a comment stays
        "Return the number of items in the box."
        total = sum(1 for item in self.items)
        return total if total else None

    def several(self):
        """Return something that takes more than
        one line to say."""
        return [item for item in self.items if item is not None]

    def third_person(self):
        """Returns the items of the box as a list."""
        return [item for item in self.items if item is not None]

    def long_string(self):
        """Return a text of two lines for the box."""
        return """one
        two""" + str(self.items) + str(self.items)

    def trivial(self):
        """Return nothing that is worth a name."""
        raise NotImplementedError("a subclass has to implement this method")
'''


def test_the_docstring_is_cut_and_the_rest_kept(tmp_path):
    (tmp_path / "boxes.py").write_text(LIBRARY)
    found = {f.docstring: f for part in ("train", "validation") for f in _either(part, tmp_path)}
    assert set(found) == {"Return the first item of a list.", "Return the number of items in the box."}
    assert found["Return the first item of a list."].code == (
        "def documented(items, default=None):\n    if items:\n        return items[0]\n    return default"
    )
    assert found["Return the number of items in the box."].code == (
        "@property\ndef size(self):\n    # a comment stays\n"
        "    total = sum(1 for item in self.items)\n    return total if total else None"
    )
    assert found["Return the first item of a list."].where == "boxes.py:2"


def _either(part, root):
    try:
        return stdlib_docstrings(part, root)
    except InputError:
        return []


def test_the_order_does_not_depend_on_the_file_system(tmp_path):
    for folder, names in (("a", ["one.py", "two.py"]), ("b", ["two.py", "one.py"])):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_text(LIBRARY.replace("first item", f"first {name[:3]}"))
    assert _either("train", tmp_path / "a") == _either("train", tmp_path / "b")
    assert _either("validation", tmp_path / "a") == _either("validation", tmp_path / "b")


def test_broken_sources_are_passed_over_and_an_empty_library_is_an_input_error(tmp_path):
    (tmp_path / "broken.py").write_text("def f(:")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    with pytest.raises(InputError, match="no library sources"):
        stdlib_docstrings("train", tmp_path)
