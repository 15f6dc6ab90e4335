"""Formats as a family: found by their files, their options are flags and keywords, and listing them loads no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvopt as package
from kvopt.errors import InputError
from kvopt.export.export_format import chosen_format, export_formats, flag, options_of
from tests.export.readers import saved
from tests.tasks import make_task
from tests.tiny import tiny_base

NEW = '''
"""``--to slot-list``: the slots, one line each."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from kvopt.export.export_format import ExportFormat, Written
from kvopt.storage.files import write_text


class SlotList(ExportFormat):
    kind: Literal["slot-list"] = "slot-list"
    takes: ClassVar[tuple[str, ...]] = ("kv",)
    first_number: int = Field(1, ge=0, description="the number of the first line")
    with_name: bool = Field(False, description="write the context's name above")
    block_size: int = Field(1, ge=1, description="slots in a block")

    def write(self, source, place: Path) -> Written:
        name = source.name + chr(10) if self.with_name else ""
        write_text(place / "slots.txt", name + "".join(f"{self.first_number + i} " for i in range(source.tokens)))
        return Written(summary="A list of slots.", snippet="", library="none")
'''

ASK = """
import contextlib, io, sys
import kvopt.export.formats
kvopt.export.formats.__path__.append({folder!r})
from kvopt import cli
for arguments in {commands!r}:
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["kvopt", "export", *arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):
        cli.main()
    print(repr((out.getvalue(), err.getvalue())))
"""


def python(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def context(tmp_path: Path) -> Path:
    """A KV context of 8 slots."""
    saved(make_task(tiny_base("llama"), tmp_path / "task", count=4), "kv", tmp_path / "c", 8)
    return tmp_path / "c"


def test_a_file_dropped_into_the_folder_is_a_format(context: Path, tmp_path: Path) -> None:
    """Its flags, their help and refusals, its place in lists and what it writes: from one new file."""
    folder = tmp_path / "dropped"
    folder.mkdir()
    (folder / "slot_list.py").write_text(NEW)
    commands = [
        ["--help"],
        [str(context), "--to", "slot-list", "--first-number", "0", "--with-name", "--block-size", "8"],
        [str(context), "--to", "slot-list", "--out", "plain"],
        [str(context), "--to", "peft", "--first-number", "3"],
        [str(context), "--to", "slot-list", "--first-number", "-1"],
        [str(context), "--to", "peft", "--block-size", "3"],
        [str(context), "--to", "prompt-embeds"],
    ]
    lines = python(ASK.format(folder=str(folder), commands=commands), tmp_path).splitlines()
    (shown, _), *_, (_, foreign), (_, small), (_, shared), (_, kind) = map(eval, lines)
    for words in (
        "vllm or slot-list",
        "--first-number",
        "Of slot-list: the",
        "--with-name",
        "(default: 16). Of slot-list: slots in",
    ):
        assert words in " ".join(shown.replace("│", " ").split())
    (numbered,) = (tmp_path / "exports").iterdir()
    name = json.loads((numbered / "kvopt-export.json").read_text())["name"]
    assert (numbered / "slots.txt").read_text() == f"{name}\n0 1 2 3 4 5 6 7 "
    assert (tmp_path / "plain" / "slots.txt").read_text() == "1 2 3 4 5 6 7 8 "
    assert foreign == "error: --first-number: is of --to slot-list alone (leave it out)\n"
    assert shared == "error: --block-size: is of --to vllm and slot-list alone (leave it out)\n"
    assert "--first-number" in small
    assert "greater than or equal to 0" in small
    assert "use --to peft, hf-cache, mlx, vllm, slot-list" in kind


def test_formats_load_without_torch_and_answer_a_wrong_flag_without_it(tmp_path: Path) -> None:
    heavy = ("torch", "transformers", "peft", "safetensors", "einops", "numpy")
    code = (
        "import contextlib, sys\nfrom kvopt import cli\n"
        "for arguments in (['--help'], ['x', '--to', 'peft', '--block-size', '3']):\n"
        "    sys.argv = ['kvopt', 'export', *arguments]\n"
        "    with contextlib.suppress(SystemExit):\n        cli.main()\n"
        f"print('loaded', [name for name in {heavy!r} if name in sys.modules])"
    )
    assert python(code, tmp_path).splitlines()[-1] == "loaded []"


def test_every_option_is_a_flag_whose_help_names_its_format(kvopt: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = kvopt("export", "--help")
    assert code == 0
    shown = " ".join(out.replace("│", " ").split())
    options = [(to, name) for to in export_formats() for name in options_of(to)]
    assert options == [
        ("peft", "peft_type"), ("mlx", "dtype"), ("mlx", "mlx_model"), ("trl-dataset", "config"),
        ("vllm", "block_size"), ("vllm", "partial_block"),
    ]  # fmt: skip
    for to, name in options:
        assert flag(name) in shown
        description = options_of(to)[name].description
        assert description
        assert f"Of {to}: {description.split()[0]}" in shown
    assert "--no-partial-block" not in shown
    assert "(default: 16)" in shown


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        ("vllm", {"blocksize": 4}, "--to vllm: no option 'blocksize' (did you mean 'block_size'?)"),
        ("peft", {"colour": 4}, "--to peft: no option 'colour' (it takes peft_type)"),
        ("hf-cache", {"colour": 4}, "--to hf-cache: no option 'colour' (it takes no options)"),
        ("hf-cache", {"kind": "peft"}, "--to hf-cache: no option 'kind' (it takes no options)"),
        ("peft", {"block_size": 4}, "--block-size: is of --to vllm alone (leave it out)"),
        (
            "vllm", {"block_size": 0},
            "--to vllm: block_size: Input should be greater than or equal to 1 (given: 0)",
        ),
        ("gguf", {}, "--to: no format 'gguf' (one of peft, prompt-embeds, hf-cache, mlx, text, trl-dataset, vllm)"),
    ],
)  # fmt: skip
def test_from_python_a_wrong_option_is_one_line(to: str, options: dict[str, Any], message: str, context: Path) -> None:
    with pytest.raises(InputError) as caught:
        package.export_context(context, to, context.parent / "out", **options)
    assert str(caught.value) == message
    assert not (context.parent / "out").exists()


def test_options_reach_what_is_written(context: Path) -> None:
    folder = package.export_context(context, "vllm", context.parent / "out", block_size=4, partial_block=False)
    facts = json.loads((folder / "kvopt-export.json").read_text())
    assert (facts["block_size"], facts["partial_block"]) == (4, False)
    assert chosen_format("peft", {"peft_type": "prefix_tuning"}).peft_type == "PREFIX_TUNING"  # type: ignore[attr-defined]
