"""The README's Python runs as it stands there, on a tiny base; the three uses take at most twelve lines each. Its table
of folders says what the folders say of themselves.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from kvopt.config.contexts import Init
from kvopt.contexts import KVContext, save_context
from kvopt.learning.start_task import StartTask, initial_tensor
from tests.jobs import SYSTEM, rows
from tests.tiny import tiny_base, tiny_folder

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)
USES = {
    "optimize": next(code for code in BLOCKS if "optimize_context(" in code and "export" not in code),
    "export": next(code for code in BLOCKS if "soft.export(" in code),
    "compare": next(code for code in BLOCKS if "compare_contexts(" in code),
}


def names() -> dict[str, Any]:
    """What the README says that the reader has: a template, rows, a base."""
    template = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Message: {{text}}"}]
    return {"template": template, "examples": rows(), "base": str(tiny_folder("llama"))}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("use", USES)
def test_each_use_takes_at_most_twelve_lines(use: str) -> None:
    assert len([line for line in USES[use].splitlines() if line.strip()]) <= 12


def test_optimize_a_context_for_a_template(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = names()
    exec(USES["optimize"], space)
    kl, folder = capsys.readouterr().out.splitlines()[-2:]
    assert 0 < float(kl.split()[0]) < 1
    assert (here / folder / "adapter_model.safetensors").is_file()
    assert space["context"].tokens == 32


def test_export_a_soft_prompt(here: Path) -> None:
    exec(USES["export"], names())
    assert (here / "exports/soft/soft_prompt.b64").is_file()
    config = json.loads((here / "exports/soft-peft/adapter_config.json").read_text())
    assert (config["peft_type"], config["num_virtual_tokens"]) == ("PROMPT_TUNING", 16)


def test_compare_learned_with_sampled(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = names()
    exec(USES["compare"], space)
    shown = capsys.readouterr().out
    kinds = {row["name"]: row["kind"] for row in space["board"].rows}
    assert kinds["kv-32"] == "kv"
    assert kinds["soft-16"] == "soft"
    assert {"original", "none"} <= set(kinds)
    assert sum(name.startswith("m0") for name in kinds) == 5, "the best five are reported"
    for name in kinds:
        assert name in shown


def test_every_other_block_runs_too(here: Path) -> None:
    """Those that load a context of a run get one."""
    base = tiny_base("llama")
    tensor = initial_tensor(Init("template").start, StartTask(base, "kv-64", "kv", 4, tuple(range(20, 30))))
    save_context(KVContext("kv-64", tensor), here / "runs/my-task/contexts/kv-64", base)
    for code in BLOCKS:
        if code not in USES.values():
            exec(code, {"base_model": AutoModelForCausalLM.from_pretrained(tiny_folder("llama"))})


def test_the_folder_table_has_every_package_and_its_own_first_sentence() -> None:
    table = dict(re.findall(r"^\| `([\w/]+)/` \| (.+) \|$", README, flags=re.M))
    packages = {
        ("" if folder.is_symlink() else "kvopt/") + folder.name: folder / "__init__.py"
        for folder in (ROOT / "kvopt").iterdir()
        if (folder / "__init__.py").is_file()
    }
    sentences = {}
    for name, init in packages.items():
        words = " ".join((ast.get_docstring(ast.parse(init.read_text("utf-8"))) or "").split())
        sentences[name] = words.partition(". ")[0].rstrip(".") + "."
    assert {name: table.get(name) for name in packages} == sentences
