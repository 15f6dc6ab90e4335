"""Take from kvopt what it keeps: a cache of models and a run directory that cannot be written, or that vanish.

    python -m tests.campaigns.caches --vanish 40

The base is a GGUF file, which kvopt converts into its cache, with hashes of its files beside it. A full cache that
cannot be written is used; an empty one, and a run directory that cannot be written, are one line. Whatever vanishes
before a command, or at a random point of it, the command ends well or with one line, and the same command again ends in
the bytes of an undisturbed one; what a command does not need, only ``kvopt run`` makes again. Prints a table.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

import yaml

from tests.campaigns.kills import COMMANDS, Campaign, bytes_of, prepare, write_campaign_job
from tests.campaigns.stopped import Outcome, Stop, run

NAMES = ("run", "score", "train", "evaluate", "export cache")
CACHE = "cache"
OF_RUN = ("reference", "scores", "contexts", "answers")
FOLDERS = (CACHE, f"{CACHE}/bases", f"{CACHE}/hashes", *(f"runs/job/{name}" for name in OF_RUN))
READERS = (
    ["inspect", "runs/job", "--json"],
    ["compare", "runs/job", "--out", "elsewhere/page.html"],
    ["export", "runs/job#kv-8", "--to", "peft", "--out", "elsewhere/kv-8"],
)
"""What needs no more of a run directory than to read it."""


def write_cached_job(folder: Path) -> None:
    """The job of the other campaigns, on a base that has to be converted."""
    from tests.gguf_file import write_gguf
    from tests.tiny import tiny_model, tiny_tokenizer

    write_campaign_job(folder)
    write_gguf(folder / "model.gguf", tiny_model("llama", len(tiny_tokenizer("chatml")), num_hidden_layers=2))
    shutil.rmtree(folder / "base")
    path = folder / "job.yaml"
    config = yaml.safe_load(path.read_text("utf-8"))
    config["model"]["base"] = "model.gguf"
    path.write_text(yaml.safe_dump(config, sort_keys=False), "utf-8")


class Caches(Campaign):
    """The same commands, with what they keep taken away from them."""

    def begin(self, name: str) -> Path:
        """As before, and a cache that the last case left read only goes first."""
        writable(self.place / "work")
        return super().begin(name)

    def check(self, name: str, what: str, folder: Path, without: tuple[str, ...] = ()) -> None:
        """The run's bytes; the cache's are compared by what they are used for."""
        left_out = (CACHE, "elsewhere", *without)
        got = {path: data for path, data in bytes_of(folder).items() if not path.startswith(left_out)}
        wanted = {path: data for path, data in self.wanted[name].items() if not path.startswith(left_out)}
        if differing := [path for path in sorted(got.keys() | wanted.keys()) if got.get(path) != wanted.get(path)]:
            self.fault(f"{name}, {what}: differs in {', '.join(differing[:6])}")

    def one_line(self, name: str, what: str, outcome: Outcome, *codes: int) -> None:
        """Record another exit code, a traceback, or a failure without its line."""
        last = (outcome.said.rstrip().splitlines() or [""])[-1]
        self.table[name, f"{what}: {outcome.code}"] += 1
        if (
            outcome.code not in codes
            or "Traceback" in outcome.said
            or (outcome.code and not last.startswith("error: "))
        ):
            self.fault(f"{name}, {what}: exit code {outcome.code}: {outcome.said[-600:]}")

    def closed_to(self, arguments: list[str], folder: Path, closed: Path) -> Outcome:
        """A command that may write all of ``folder`` but ``closed``."""
        for path in (closed, *closed.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        outcome = run(arguments, folder, ordinary=True)
        writable(folder)
        return outcome

    def closed_cache(self, name: str) -> None:
        """A full cache that cannot be written, and an empty one."""
        folder = self.begin(name)
        (folder / CACHE).mkdir(exist_ok=True)
        full = any((folder / CACHE).rglob("*.safetensors"))
        what = "full cache closed" if full else "empty cache closed"
        outcome = self.closed_to(COMMANDS[name], folder, folder / CACHE)
        self.one_line(name, what, outcome, 0 if full else 2)
        self.again(name, what, folder)

    def closed_run(self, name: str) -> None:
        """A run directory that cannot be written: what works in it says so, what reads it works."""
        folder = self.begin(name)
        if not (folder / "runs" / "job" / "leaderboard.json").is_file():
            return
        before = bytes_of(folder / "runs")
        if not name.startswith("export"):
            self.one_line(name, "run closed", self.closed_to(COMMANDS[name], folder, folder / "runs"), 2)
        for reader in READERS:
            self.one_line(name, f"{reader[0]} of it", self.closed_to(reader, folder, folder / "runs"), 0)
        if bytes_of(folder / "runs") != before:
            self.fault(f"{name}: a run directory that cannot be written has changed")

    def vanish(self, number: int) -> None:
        """A folder that is gone before a command, or at a random point of it."""
        name = self.names[number % len(self.names)]
        folder, gone = self.begin(name), FOLDERS[number // len(self.names) % len(FOLDERS)]
        at = self.chance.choice((1, self.chance.randint(1, len(self.calls[name]))))
        outcome = run(COMMANDS[name], folder, Stop("vanish", at, folder=folder / gone))
        self.one_line(name, f"{Path(gone).name} gone", outcome, 0, 1, 2)
        what = f"{gone} gone at call {at}: {outcome.said[-200:]!r}"
        if gone.startswith(CACHE) or name == "run":
            self.again(name, what, folder)
            return
        self.one_line(name, f"{Path(gone).name} still gone", run(COMMANDS[name], folder), 0, 2)
        boards = ("runs/job/leaderboard.",) if gone.endswith("scores") else ()  # pairs are compared by stored scores
        self.check(name, what, folder, without=(gone, *boards))


def writable(folder: Path) -> None:
    """Open everything again."""
    for path in (folder, *folder.rglob("*")) if folder.is_dir() else ():
        path.chmod(0o755 if path.is_dir() else 0o644)


def campaign(place: Path, vanish: int, seed: int = 0) -> Caches:
    """All of it."""
    import kvopt.base.identity

    prepare()
    os.environ["KVOPT_CACHE"] = str(place / "work" / CACHE)
    kvopt.base.identity.LARGE = 0  # hashes are remembered as those of large files are
    done = Caches(place, list(NAMES), seed, write_cached_job)
    for name in done.names:
        done.closed_cache(name)
        done.closed_run(name)
    for number in range(vanish):
        done.vanish(number)
    return done


def main() -> None:
    """Print the table and the faults; exit code 1 with any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("vanish", 40), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvopt-caches-") as folder:
        done = campaign(Path(folder), given.vanish, given.seed)
        writable(Path(folder))
    done.tell(as_json=given.json)


if __name__ == "__main__":
    main()
