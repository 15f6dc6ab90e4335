"""Give kvopt thousands of damaged and odd inputs: templates, data, configs, mutation files, folders of contexts and
students, run directories.

    python -m tests.campaigns.fuzz --cases 10000

Each case is one command, or one call that reads a folder, in a forked child. It must end within 10 seconds and 1 GiB,
with exit code 0, 1 or 2 and at most one error line, never with a traceback; and where it ends with 0, a strict reader
(:mod:`tests.campaigns.strict`) must come to the same result. Case N is always the same: ``--only N`` runs it alone and
shows it. Prints a table and the faults.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.campaigns.damage import change_for
from tests.campaigns.strict import Folders, cases_of

SECONDS, MEMORY = 10.0, 1 << 30


@dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        kind: of the input.
        run: what the child does in the case's folder; returns what it prints as its result.
        wrong: given what was printed, what is wrong with it although the exit code is 0; None where it is right.
    """

    kind: str
    run: Callable[[Path], None]
    wrong: Callable[[str], str | None] = lambda out: None


@dataclass(frozen=True)
class Ended:
    """How a case ended: exit code (minus a signal), what it printed, seconds, and bytes beyond those of its parent."""

    code: int
    out: str
    err: str
    seconds: float
    memory: int

    def fault(self, case: Case) -> str | None:
        """What must not be; None for a good end."""
        if self.seconds > SECONDS:
            return f"hangs ({self.seconds:.0f} s)"
        if "Traceback (most recent call last)" in self.err:
            return "traceback: " + self.err.strip().splitlines()[-1][:200]
        if self.code not in (0, 1, 2):
            return f"exit code {self.code}: {self.err[-200:]}"
        if self.memory > MEMORY:
            return f"takes {self.memory >> 20} MiB"
        if self.code and not self.err.rstrip().splitlines()[-1:][0].startswith("error: "):
            return f"exit code {self.code} without an error line: {self.err[-200:]}"
        return case.wrong(self.out) if self.code == 0 else None


def attempt(case: Case, folder: Path) -> Ended:
    """Run a case in a child of its own, in ``folder``."""
    out, err = folder.with_suffix(".out"), folder.with_suffix(".err")
    child = os.fork()
    if child == 0:
        _in_child(case, folder, out, err)
    begin = time.monotonic()
    while True:
        ended, status, usage = os.wait4(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() - begin > SECONDS:
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            break
        time.sleep(0.001)
    seconds = max(time.monotonic() - begin, 0.0)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    texts = [path.read_bytes().decode("utf-8", "replace") if path.exists() else "" for path in (out, err)]
    # a machine that is busy with other things makes nothing hang: CPU time counts
    busy = usage.ru_utime + usage.ru_stime
    hangs = seconds > SECONDS and busy > SECONDS / 4
    return Ended(os.waitstatus_to_exitcode(status), *texts, seconds if hangs else busy, (usage.ru_maxrss - own) * 1024)


def _in_child(case: Case, folder: Path, out: Path, err: Path) -> None:
    code = 70
    try:
        os.chdir(folder)
        for stream, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            case.run(folder)
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0
        except BaseException:
            import traceback

            traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Fuzz:
    """Cases by number over good inputs that are made once in ``place``."""

    def __init__(self, place: Path, seed: int = 0) -> None:
        self.place, self.seed = place, seed
        self.folders = Folders.made(place / "good")
        self.kinds = cases_of(self.folders)
        self.table: Counter[tuple[str, str]] = Counter()
        self.faults: list[str] = []

    def case(self, number: int) -> tuple[Case, Path]:
        """Case ``number``, with its folder written."""
        chance = random.Random(f"{self.seed}:{number}")
        name = list(self.kinds)[number % len(self.kinds)]
        folder = self.place / "case"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        run, wrong = self.kinds[name](chance, folder)
        return Case(name, run, wrong), folder

    def one(self, number: int) -> Ended:
        """Run a case and count it."""
        case, folder = self.case(number)
        ended = attempt(case, folder)
        fault = ended.fault(case)
        self.table[case.kind, "fault" if fault else f"exit code {ended.code}"] += 1
        if fault:
            self.faults.append(f"case {number} ({case.kind}): {fault}")
            print(self.faults[-1], file=sys.stderr, flush=True)
        return ended


def main() -> None:
    """Print the table and the faults; exit code 1 with any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("cases", 10_000), ("first", 0), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", type=int, help="run this case alone, show it, and leave its folder")
    given = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="kvopt-fuzz-"))
    fuzz = Fuzz(place, given.seed)
    if given.only is not None:
        ended = fuzz.one(given.only)
        print(f"folder: {place / 'case'}\nexit code {ended.code}\n--- out\n{ended.out}\n--- err\n{ended.err}")
    else:
        for number in range(given.first, given.first + given.cases):
            fuzz.one(number)
        columns = sorted({what for _, what in fuzz.table})
        print(f"{'kind':16s}" + "".join(f"{what:>14s}" for what in columns))
        for kind in fuzz.kinds:
            print(f"{kind:16s}" + "".join(f"{fuzz.table[kind, what]:14d}" for what in columns))
        shutil.rmtree(place, ignore_errors=True)
    print(f"{len(fuzz.faults)} faults\n" + "\n".join(fuzz.faults))
    sys.exit(1 if fuzz.faults else 0)


__all__ = ["Case", "Ended", "Fuzz", "attempt", "change_for", "json", "main"]

if __name__ == "__main__":
    main()
