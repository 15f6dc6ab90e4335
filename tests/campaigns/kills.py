"""Stop kvopt anywhere and give the same command again: the same bytes must result, and nothing half-written be left.

    python -m tests.campaigns.kills --kills 200 --full 50 --pairs 6

Every command of a whole job (wordings, contexts, scores, a page, shorter texts, students, a study, exports) is run once
without a stop. Then, again and again, one of them is taken, begun on what the commands before it left, stopped at a
random point, and given again. Also: a full disk at random points, and two processes in one directory. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from tests.campaigns.stopped import Outcome, Stop, partials, run

SECONDS = re.compile(rb'"seconds": [0-9.e-]+|"checksum": "[0-9a-f]+"')
"""Times, and the checksum of a file that has some."""
NOT_COMPARED = ("ledger.jsonl", ".lock", "report.html")
COMMANDS: dict[str, list[str]] = {
    "mutate": ["mutate", "job.yaml"],
    "optimize": ["optimize", "job.yaml"],
    "score": ["score", "job.yaml", "--context", "original", "--context", "none", "--context", "text:mine.txt"],
    "run": ["run", "job.yaml", "--set", "students=[]", "--set", "study=null"],
    "shorten": ["shorten", "job.yaml", "--tokens", "60", "--rows", "3", "--exchanges", "1"],
    "frontier": [
        "frontier", "job.yaml", "--tokens", "60", "--steps", "2", "--rows", "3", "--exchanges", "1",
        "--set", "study=null",
    ],
    "train": ["train", "job.yaml"],
    "evaluate": ["evaluate", "job.yaml"],
    "study": ["study", "job.yaml"],
    "export": ["export", "runs/job#kv-8", "--to", "peft", "--out", "exports/kv-8"],
    "export cache": ["export", "runs/job#kv-8", "--to", "hf-cache", "--out", "exports/kv-8-cache"],
    "export data": ["export-data", "job.yaml", "--out", "exports/rows.jsonl", "--context", "original"],
    "other settings": ["run", "job.yaml", "--set", "seed=1", "--set", "students=[]", "--set", "study=null"],
    "and back": ["run", "job.yaml"],
}  # fmt: skip
"""By name, each on what those before it left. The last two put results aside and take them up again."""
SHORT = ("mutate", "optimize", "run", "shorten", "train", "evaluate", "export", "export data")
"""Those of a short campaign."""


def write_campaign_job(folder: Path) -> None:
    """The config, its data and what its commands name."""
    from tests.jobs import write_job
    from tests.train.evaluated import student

    def change(config: dict[str, Any]) -> None:
        config["contexts"] = [config["contexts"][0] | {"steps": 3, "eval_every": 1}, config["contexts"][2]]
        config["contexts"][1] |= {"steps": 2}
        config["evaluate"] = {"rows": 2, "max_new_tokens": 2, "batch_size": 4, "resamples": 100}
        config["evaluate"]["metrics"] = ["exact-match"]
        config["score"]["resamples"] = 100
        config["students"] = [student("s1", "original", "best-mutations:1", checkpoint_every=1)]
        config["students"].append(student("s2", "original", method="full", checkpoint_every=2))
        config["study"] = {"seeds": [0], "amount": 2, "budget": "steps"}

    config = write_job(folder, change)
    (folder / "mine.txt").write_text("Sort it.", "utf-8")
    shutil.copytree(yaml.safe_load(config.read_text("utf-8"))["model"]["base"], folder / "base")
    text = config.read_text("utf-8")
    config.write_text(text.replace(str(yaml.safe_load(text)["model"]["base"]), "base"), "utf-8")


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file that is not one of times."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in NOT_COMPARED)
    return {str(path.relative_to(folder)): _without_times(path) for path in files}


def _without_times(path: Path) -> bytes:
    return SECONDS.sub(b"", path.read_bytes()) if path.name == "study.json" else path.read_bytes()


class Campaign:
    """Commands with what each began on and ended in; ``faults`` are what must not be."""

    def __init__(self, place: Path, names: list[str], seed: int, write: Callable[[Path], None] | None = None) -> None:
        self.place, self.names, self.chance = place, names, random.Random(seed)
        self.faults: list[str] = []
        self.table: Counter[tuple[str, str]] = Counter()
        self.calls: dict[str, list[str]] = {}
        self.wanted: dict[str, dict[str, bytes]] = {}
        (write or write_campaign_job)(place / "work")
        for name in names:
            self.before(name).parent.mkdir(exist_ok=True)
            shutil.copytree(place / "work", self.before(name))
            outcome = run(COMMANDS[name], place / "work")
            if outcome.code != 0:
                raise SystemExit(f"{name} failed: {outcome.said[-2000:]}")
            self.calls[name], self.wanted[name] = outcome.calls, bytes_of(place / "work")
            self.check(name, "uninterrupted", place / "work")
        shutil.rmtree(place / "work")

    def before(self, name: str) -> Path:
        """What a command begins on; every command works in a folder of the same path, which is in some files."""
        return self.place / "before" / name.replace(" ", "-")

    def begin(self, name: str) -> Path:
        shutil.rmtree(self.place / "work", ignore_errors=True)
        return Path(shutil.copytree(self.before(name), self.place / "work"))

    def check(self, name: str, what: str, folder: Path) -> None:
        """Record what differs from the uninterrupted command, or is not whole."""
        got, wanted = bytes_of(folder), self.wanted[name]
        differing = [path for path in sorted(got.keys() | wanted.keys()) if got.get(path) != wanted.get(path)]
        if differing:
            self.fault(f"{name}, {what}: differs in {', '.join(differing[:6])}")
        if left := partials(folder):
            self.fault(f"{name}, {what}: left {', '.join(left[:6])}")

    def again(self, name: str, what: str, folder: Path) -> None:
        """The same command to its end."""
        outcome = run(COMMANDS[name], folder)
        if outcome.code != 0:
            self.fault(f"{name}, {what}: given again it failed: {outcome.said[-400:]}")
        self.check(name, what, folder)

    def tell(self, *, as_json: bool) -> NoReturn:
        """Print the table and the faults; exit code 1 with any."""
        if as_json:
            print(json.dumps({"table": [[*key, count] for key, count in self.table.items()], "faults": self.faults}))
        else:
            columns = sorted({what for _, what in self.table})
            print(f"{'command':16s}" + "".join(f"{what:>24s}" for what in columns))
            for name in self.names:
                print(f"{name:16s}" + "".join(f"{self.table[name, what]:24d}" for what in columns))
            print(f"{len(self.faults)} faults")
            print("\n".join(self.faults))
        sys.exit(1 if self.faults else 0)

    # ---- stops

    def point(self, name: str, how: str) -> Stop:
        """A random place in a command."""
        calls = self.calls[name]
        if how == "after":
            return Stop("after", seconds=self.chance.uniform(0.0, 2.5))
        at = self.chance.randint(1, len(calls))
        if how == "before":
            return Stop("before", at)
        writes = [i for i, call in enumerate(calls, 1) if call.startswith("open ")]
        return Stop(how, self.chance.choice(writes), int(2 ** self.chance.uniform(0, 14)))  # type: ignore[arg-type]

    def kill(self, number: int) -> None:
        """One command, killed once or several times in a row, then given again."""
        name, how = (
            self.names[number % len(self.names)],
            ("before", "inside", "inside", "after")[number // len(self.names) % 4],
        )
        folder, stops = self.begin(name), []
        for _ in range(self.chance.choice((1, 1, 1, 2, 3))):
            stop = self.point(name, how)
            outcome = run(COMMANDS[name], folder, stop)
            stops.append(f"{stop} at {outcome.calls[-1] if outcome.calls else 'the beginning'}")
            self.table[name, f"killed {how}" if outcome.killed else "came to its end"] += 1
            if not outcome.killed:
                self.expect_done(name, stops[-1], outcome)
        self.again(name, "; ".join(stops), folder)

    def fault(self, what: str) -> None:
        """Record what must not be, and say so at once: a campaign takes long."""
        print(what, file=sys.stderr, flush=True)
        self.faults.append(what)

    def expect_done(self, name: str, what: str, outcome: Outcome) -> None:
        """A command that was to be killed in a write came to its end, or took the half write for a full disk."""
        if outcome.code != 0 and "disk is full" not in outcome.said:
            self.fault(f"{name}, {what}: exit code {outcome.code}: {outcome.said[-400:]}")

    def fill(self, number: int) -> None:
        """One command on a disk that is full from some point on: one line, exit code 1, nothing lost."""
        name = self.names[number % len(self.names)]
        folder, stop = self.begin(name), self.point(name, "full")
        outcome = run(COMMANDS[name], folder, stop)
        what = f"{stop} at {outcome.calls[-1] if outcome.calls else 'the beginning'}"
        self.table[name, "disk full" if outcome.code else "came to its end"] += 1
        if "Traceback" in outcome.said or outcome.code not in (0, 1):
            self.fault(f"{name}, {what}: exit code {outcome.code}: {outcome.said[-600:]}")
        elif outcome.code == 1 and not outcome.said.rstrip().splitlines()[-1].startswith("error: "):
            self.fault(f"{name}, {what}: the last line is no error: {outcome.said[-200:]}")
        self.again(name, what, folder)

    def pair(self, name: str) -> None:
        """Two processes with one command: one does it, the other waits its turn or is told so."""
        folder, outcomes = self.begin(name), []
        threads = [threading.Thread(target=lambda: outcomes.append(run(COMMANDS[name], folder))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        codes = sorted(outcome.code for outcome in outcomes)
        self.table[name, f"two at once: {codes}"] += 1
        refused = [one.said for one in outcomes if one.code]
        if codes[0] != 0 or any("another kvopt is working" not in said for said in refused):
            self.fault(f"{name}, two at once: {codes}: {refused}")
        self.again(name, "two at once", folder)


def campaign(place: Path, *, kills: int, full: int, pairs: int, short: bool, seed: int = 0) -> Campaign:
    """All of it; ``short`` takes fewer commands."""
    prepare()
    done = Campaign(place, list(SHORT if short else COMMANDS), seed)
    for number in range(kills):
        done.kill(number)
    for number in range(full):
        done.fill(number)
    for name in done.names[:pairs]:
        done.pair(name)
    return done


def prepare() -> None:
    """Import everything before the first fork, and compute nothing."""
    # one thread by the environment: a number that is set by a call is set again in every new thread, and after a fork
    # torch's pool of threads, which that needs, is not there any more
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    import kvopt.export.writing
    import kvopt.learning.descent_state
    import kvopt.report.page
    import kvopt.run.frontier
    import kvopt.run.run
    import kvopt.train.commands

    kvopt.learning.descent_state.SECONDS_BETWEEN_CHECKPOINTS = 0.0  # after every step, as in runs that take long
    kvopt.learning.descent_state.WRITES_BETWEEN_CHECKPOINTS = 0.0


def main() -> None:
    """Print the table and the faults; exit code 1 with any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("kills", 200), ("full", 50), ("pairs", 14), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--short", action="store_true", help="fewer commands")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvopt-kills-") as folder:
        done = campaign(
            Path(folder), kills=given.kills, full=given.full, pairs=given.pairs, short=given.short, seed=given.seed
        )
    done.tell(as_json=given.json)


if __name__ == "__main__":
    main()
