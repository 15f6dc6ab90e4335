"""A mutation tester: small faults are put into modules one at a time, and the tests that go with each must find them.

    python tools/mutants.py [MODULE ...] [--count 20] [--seed 0] [--journal build/mutants.jsonl] [--table]

``mutants.toml`` says which tests go with which module, and which mutants change no behaviour. Everything happens in a
copy of the working tree. A first run of the tests, without a fault, notes which test runs which line; a mutant is then
tried by the tests that run its line. Each run is a fork of this process, which has torch and transformers imported but
nothing of kvopt, so a mutant costs the seconds of its tests alone. (cosmic-ray starts a process for each mutant: its
imports, 4 s of CPU time and those of kvopt, would cost more than most tests.)

The journal has a line for each mutant and is written as the run goes: give the same command again to go on. Mutants
that were found stay found until their module changes; those that survived are tried again when a test file changes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutant_faults import Mutant, Mutants

ROOT = Path(__file__).resolve().parents[1]
PLAN = tomllib.loads((ROOT / "tools" / "mutants.toml").read_text("utf-8"))
MEMORY = 8 * 2**30
"""Bytes of address space that a run may have."""

# ---- runs of the tests, each in a fork


class Watch:
    """A plugin of pytest: which lines of a module each test runs, and the first test that fails."""

    def __init__(self, module: Path | None) -> None:
        self.module, self.failed, self.now = module, "", ""
        self.lines: dict[str, set[int]] = {"": set()}
        self._is_module: dict[str, bool] = {}
        if module is not None:
            sys.settrace(self._trace)

    def _trace(self, frame: Any, event: str, argument: object) -> Any:
        name = frame.f_code.co_filename
        if name not in self._is_module:
            self._is_module[name] = os.path.realpath(name) == str(self.module)
        return self._line if self._is_module[name] else None

    def _line(self, frame: Any, event: str, argument: object) -> Any:
        self.lines.setdefault(self.now, set()).add(frame.f_lineno)
        return self._line

    def pytest_runtest_call(self, item: Any) -> None:
        self.now = item.nodeid
        self.lines.setdefault(self.now, set())
        if self.module is not None:
            sys.settrace(self._trace)  # a test or a library may have taken it away

    def pytest_runtest_teardown(self, item: Any) -> None:
        self.now = ""  # fixtures and imports serve every test

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = f"{report.nodeid} ({report.when})" if report.when != "call" else report.nodeid


@dataclass(frozen=True)
class Outcome:
    """How a run of tests ended: ``passed``, ``failed`` (with the test), or ``time`` (over its limit)."""

    verdict: str
    test: str
    seconds: float
    lines: dict[str, list[int]]


def run_tests(tree: Path, tests: list[str], *, limit: float | None, module: Path | None = None) -> Outcome:
    """Run tests in a fork of this process, in ``tree``, within ``limit`` seconds of CPU time."""
    result = tree.parent / "result.json"
    result.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        os.setsid()
        _run_tests_here(tree, tests, limit, module, result)
    last = time.monotonic() + (20 * limit if limit else 3600)
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > last:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.05)
    if not result.is_file():
        return Outcome("time", "", limit or 0, {})
    return Outcome(**json.loads(result.read_text("utf-8")))


def _run_tests_here(tree: Path, tests: list[str], limit: float | None, module: Path | None, result: Path) -> None:
    import pytest

    if limit is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit) + 1, int(limit) + 2))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    log = os.open(tree.parent / "tests.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(tree)
    sys.path[:0] = [str(tree)]
    os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = module is None
    watch, before = Watch(module), time.process_time()
    code = 3
    try:
        temporary = tree.parent / "pytest"
        code = pytest.main(["-x", "-p", "no:cacheprovider", f"--basetemp={temporary}", *tests], plugins=[watch])
        sys.settrace(None)
        if code == 0 and not sys.modules["kvopt"].__file__.startswith(str(tree)):  # type: ignore[union-attr]
            code, watch.failed = 3, "the tests ran on another copy of kvopt"
    finally:
        verdict = "passed" if code == 0 else "failed"
        lines = {name: sorted(of) for name, of in watch.lines.items()}
        outcome = [
            verdict,
            watch.failed or ("" if code == 0 else f"exit code {int(code)}"),
            time.process_time() - before,
        ]
        result.write_text(
            json.dumps(dict(zip(("verdict", "test", "seconds", "lines"), [*outcome, lines], strict=True)))
        )
        os._exit(0)


def copied_tree(folder: Path) -> Path:
    """The working tree without what git ignores, in a folder of its own."""
    tree = folder / "tree"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, check=True, capture_output=True
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_symlink() or (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
    return tree


def forget_bytecode(file: Path) -> None:
    for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*.pyc"):
        compiled.unlink()


# ---- the journal


def digest(paths: list[str]) -> str:
    return hashlib.sha256(b"".join((ROOT / path).read_bytes() for path in paths)).hexdigest()[:12]


def known(journal: Path) -> dict[str, dict[str, Any]]:
    """The last entry of each mutant by its id."""
    if not journal.is_file():
        return {}
    return {entry["id"]: entry for entry in map(json.loads, journal.read_text("utf-8").splitlines())}


def sampled(module: str, seed: int, count: int) -> list[Mutant]:
    """``count`` mutants of a module, the same ones for a seed as long as their lines stay; more begin with fewer."""
    source = (ROOT / module).read_bytes()
    mutants = {mutant.id(source): mutant for mutant in Mutants(module, source).found}
    order = sorted(mutants, key=lambda i: hashlib.sha256(f"{seed} {i}".encode()).digest())
    return [mutants[i] for i in order[:count]]


def run_module(module: str, tree: Path, seed: int, count: int, journal: Path) -> Iterator[dict[str, Any]]:
    """Try the mutants of a module that the journal has not, and earlier survivors on tests that have changed; yields an
    entry for each.
    """
    tests, source = PLAN["tests"][module], (ROOT / module).read_bytes()
    versions = {"source": digest([module]), "tests": digest(tests)}
    entries, equivalent = known(journal), PLAN["equivalent"]

    def settled(mutant: Mutant) -> bool:
        entry = entries.get(mutant.id(source), {"source": ""})
        same = entry["source"] == versions["source"]
        return mutant.id(source) in equivalent or (
            same and (entry["verdict"] != "survived" or entry["tests"] == versions["tests"])
        )

    def survived(mutant: Mutant) -> bool:
        return entries.get(mutant.id(source), {"verdict": ""})["verdict"] == "survived"

    before = filter(survived, Mutants(module, source).found)
    wanted = {mutant.id(source): mutant for mutant in (*before, *sampled(module, seed, count))}
    todo = [mutant for mutant in wanted.values() if not settled(mutant)]
    if not todo:
        return
    file = tree / module
    whole = run_tests(tree, tests, limit=None, module=file)
    if whole.verdict != "passed":
        raise SystemExit(f"{module}: without a fault, {whole.test or 'the tests'} fails; see {tree.parent}/tests.log")
    forget_bytecode(file)
    always = set(whole.lines[""])
    for mutant in todo:
        lines = set(range(mutant.line, mutant.line + 1 + mutant.diff(source)[0].count("\n")))
        running = [test for test, ran in whole.lines.items() if test and (lines & always or lines & set(ran))]
        outcome = None
        if running:
            file.write_bytes(mutant.applied(source))
            outcome = run_tests(tree, running, limit=10 + 4 * whole.seconds)
            file.write_bytes(source)
        before, after = mutant.diff(source)
        verdict = "survived" if outcome is None or outcome.verdict == "passed" else "found"
        by = "no test runs this line" if outcome is None else outcome.test or outcome.verdict
        yield versions | {
            "id": mutant.id(source), "module": module, "line": mutant.line, "kind": mutant.kind, "verdict": verdict,
            "by": by, "seconds": round(outcome.seconds, 2) if outcome else 0, "before": before, "after": after,
        }  # fmt: skip


def table(modules: list[str], journal: Path) -> str:
    """The mutants in the journal that still can be made, by module, and every survivor."""
    entries, equivalent = known(journal), PLAN["equivalent"]
    lines, survivors, sums = (
        ["| module | mutants | found | equivalent | survived |", "|---|---|---|---|---|"],
        [],
        [0] * 4,
    )
    for module in modules:
        source = (ROOT / module).read_bytes()
        ids = dict.fromkeys(mutant.id(source) for mutant in Mutants(module, source).found)
        tried = [i for i in ids if i in equivalent or i in entries]
        same = [i for i in tried if i in equivalent]
        lived = [entries[i] for i in tried if i not in equivalent and entries[i]["verdict"] == "survived"]
        row = [len(tried), len(tried) - len(same) - len(lived), len(same), len(lived)]
        if tried:
            lines.append(f"| {module} | " + " | ".join(map(str, row)) + " |")
            sums = [one + two for one, two in zip(sums, row, strict=True)]
        survivors += sorted(lived, key=lambda entry: entry["line"])
    lines.append("| all | " + " | ".join(map(str, sums)) + " |")
    for entry in survivors:
        lines += ["", f"{entry['module']}:{entry['line']} {entry['kind']} {entry['id']} ({entry['by']})"]
        lines += [f"- {line}" for line in entry["before"].splitlines()]
        lines += [f"+ {line}" for line in entry["after"].splitlines()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("modules", nargs="*", default=list(PLAN["tests"]), help="default: all of mutants.toml")
    parser.add_argument("--count", type=int, default=20, help="mutants of each module (0: only earlier survivors)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--journal", type=Path, default=ROOT / "build" / "mutants.jsonl")
    parser.add_argument("--table", action="store_true", help="print the table of the journal and run nothing")
    options = parser.parse_args()
    if unknown := [module for module in options.modules if module not in PLAN["tests"]]:
        parser.error(f"mutants.toml names no tests for {', '.join(unknown)}")
    sample = (options.seed, options.count, options.journal)
    if not options.table:
        os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        sys.path = [
            path for path in sys.path if path and Path(path).resolve() != ROOT
        ]  # transformers tries ``kernels``
        import hypothesis  # noqa: F401  (imported once, before the forks)
        import peft  # noqa: F401
        import scipy.stats  # noqa: F401
        import torch
        import transformers

        transformers.LlamaForCausalLM  # noqa: B018  (its modules load when they are first used)
        torch.set_num_threads(1)
        options.journal.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="kvopt-mutants-") as folder:
            tree = copied_tree(Path(folder))
            for module in options.modules:
                for entry in run_module(module, tree, *sample):
                    with options.journal.open("a", encoding="utf-8") as journal:
                        journal.write(json.dumps(entry, ensure_ascii=False) + "\n")
                    print(f"{entry['verdict']:8} {module}:{entry['line']} {entry['kind']} {entry['by']}", flush=True)
    print(table(options.modules, options.journal))


if __name__ == "__main__":
    main()
