"""Kill runs with SIGKILL at chosen points and go on with them. Run as a program: ``killing.py JOB FOLDER``.

Each run is a forked child of this process, which has imported everything but computed nothing, so a run starts at
once. The child counts the operating system's calls on files under its run directory with an audit hook (nothing in
kvopt is changed) and sends itself SIGKILL at a given one, or its parent does after a given time. Prints one JSON
document.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

PLACES = (
    "/.config.yaml", "/.manifest.json", "/reference/", "/mutations.jsonl", "/.state/", "/contexts/", "/scores/",
    "/ledger.jsonl", "/.leaderboard.json", "/.leaderboard.csv", "/.scores.jsonl", "/.samples.json",
)  # fmt: skip
CHAINS, KILLS, TIMED, SEED = 2, 6, 4, 11


def attempt(config: Path, out: Path, at: int | None = None, seconds: float | None = None) -> tuple[bool, list[str]]:
    """One run in a child, killed at its ``at``-th call on a file or after ``seconds``. Returns whether it came to its
    end, and the calls seen."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            sys.addaudithook(_counter(str(out), write, at))
            from tests.jobs import run_job

            run_job(config, out)
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(3)
    os.close(write)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(read) as pipe:
        calls = pipe.read().splitlines()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False, calls
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"a run failed with status {status} after {len(calls)} calls")
    return True, calls


def _counter(out: str, report: int, at: int | None) -> Callable[[str, tuple[object, ...]], None]:
    changing = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "open")
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event not in changing or not str(arguments[0]).startswith(out):
            return
        if event == "open" and not int(str(arguments[2] or 0)) & (os.O_WRONLY | os.O_RDWR):
            return
        count += 1
        os.write(report, f"{event} {str(arguments[0]).removeprefix(out)}\n".encode())
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def finish(config: Path, out: Path) -> None:
    """The same run once more, to its end."""
    if not attempt(config, out)[0]:
        raise SystemExit("a run that was to come to its end was killed by something else")


def main(config: Path, folder: Path) -> None:
    from tests.jobs import artefacts

    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(SEED)
    start = time.monotonic()
    _, calls = attempt(config, folder / "whole")
    length = time.monotonic() - start
    wanted = artefacts(folder / "whole")
    result: dict[str, object] = {"calls": calls, "artefacts": sorted(wanted), "differing": [], "killed": []}

    def check(name: str, killed: list[str]) -> None:
        got = artefacts(folder / name)
        wrong = sorted(path for path in wanted.keys() | got.keys() if wanted.get(path) != got.get(path))
        result["killed"].append({"run": name, "at": killed})  # type: ignore[attr-defined]
        if wrong:
            result["differing"].append({"run": name, "at": killed, "files": wrong})  # type: ignore[attr-defined]
        shutil.rmtree(folder / name)

    for number, place in enumerate(PLACES):
        points = [i for i, call in enumerate(calls, 1) if call.split(" ", 1)[1].startswith(place)]
        _, seen = attempt(config, folder / f"single-{number}", at=chance.choice(points))
        finish(config, folder / f"single-{number}")
        check(f"single-{number}", seen[-1:])
    for number in range(CHAINS):
        name, killed, done = f"chain-{number}", [], False
        while not done and len(killed) < KILLS:
            done, seen = attempt(config, folder / name, at=chance.randint(10, len(calls) // 4))
            killed += [] if done else seen[-1:]
        finish(config, folder / name)
        check(name, killed)
    for number in range(TIMED):
        attempt(config, folder / f"timed-{number}", seconds=length * (number + 0.5) / TIMED)
        finish(config, folder / f"timed-{number}")
        check(f"timed-{number}", ["a moment"])
    print(json.dumps(result))


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import torch

    torch.set_num_threads(1)
    import kvopt.learning.descent_state
    import tests.jobs  # noqa: F401  (everything is imported before the first fork)

    kvopt.learning.descent_state.SECONDS_BETWEEN_CHECKPOINTS = 0.0  # after every step, as in runs that take long
    kvopt.learning.descent_state.WRITES_BETWEEN_CHECKPOINTS = 0.0

    main(Path(sys.argv[1]), Path(sys.argv[2]))
