"""Part "tests" of ``tools/gpu_check.sh``: ``pytest -m gpu tests/gpu`` on the device, one line for each test.

Each file of tests runs in a process of its own on a GPU: one illegal memory access spoils a process for good.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu_environment import environment, options
from gpu_report import ROOT, Part

FOLDER = "tests/gpu"
NO_TESTS = 5  # pytest's exit code where no test was chosen


class Recorder:
    """A pytest plugin that notes each test as soon as it is over."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def pytest_runtest_logreport(self, report: Any) -> None:
        """The call, or the set-up or tear-down that went wrong."""
        skipped, broken = report.skipped, report.failed
        if report.when != "call" and not skipped and not broken:
            return
        item = {"name": report.nodeid.removeprefix(FOLDER + "/"), "result": report.outcome, "s": report.duration}
        if broken:
            lines = [line for line in report.longreprtext.splitlines() if line.strip()]
            said = [line[1:].strip() for line in lines if line.startswith("E ")] or lines[-1:]
            item["why"] = " ".join(said)[:300]
        elif skipped:
            item["why"] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)[:300]
        self.part.add(item, failed=broken)

    def pytest_collectreport(self, report: Any) -> None:
        """A file that cannot be imported."""
        if report.failed:
            why = " ".join(report.longreprtext.split())[-300:]
            self.part.add({"name": report.nodeid or FOLDER, "result": "not collected", "why": why}, failed=True)


def run_file(part: Part, paths: list[str]) -> int:
    """Run tests in this process; returns pytest's exit code."""
    import pytest

    chosen = shlex.split(os.environ.get("GPU_CHECK_PYTEST", ""))
    given = ["-m", "gpu and not slow", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "--tb", "short", *chosen]
    return int(pytest.main([*given, *paths], plugins=[Recorder(part)]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    options(parser)
    parser.add_argument("--file", help="one file of tests, in this process (used inside)")
    given = parser.parse_args()
    os.environ["KVOPT_TEST_DEVICE"] = given.device
    os.chdir(ROOT)
    if given.file:
        part = Part.reopened(given.out, "tests", given.size, given.device)
        return run_file(part, [given.file])
    columns = {"test": "name", "result": "result", "s": "s", "why": "why"}
    part = Part(given.out, "tests", given.size, given.device, columns, "Tests on the device")
    part.facts["environment"] = environment(given.device)
    part.write()
    import torch

    if given.device == "cuda" and not torch.cuda.is_available():
        part.add({"name": "device", "result": "missing", "why": "torch sees no CUDA device"}, failed=True)
        return 1
    codes: dict[str, int] = {}
    if given.device == "cuda":
        for file in sorted(Path(FOLDER).glob("test_*.py")):
            command = [sys.executable, __file__, *sys.argv[1:], "--file", str(file)]
            codes[str(file)] = subprocess.run(command).returncode
            part = Part.reopened(given.out, "tests", given.size, given.device)
    else:
        codes[FOLDER] = run_file(part, [FOLDER])
    whole = True
    for name, code in codes.items():
        if code in (0, 1):  # all passed, or some failed, which the items say
            continue
        if code == NO_TESTS and os.environ.get("GPU_CHECK_PYTEST") and part.facts["items"]:
            continue  # the tests that were asked for are in another file
        part.add({"name": name, "result": "did not run", "why": f"pytest's exit code {code}"}, failed=True)
        whole = False
    return part.finish() if whole else 1


if __name__ == "__main__":
    sys.exit(main())
