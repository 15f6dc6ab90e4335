"""A run that is killed or interrupted, and then started again, ends in the bytes of a run that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import killing
from tests.jobs import artefacts, run_job, write_job

ROOT = Path(__file__).parents[1]
ALONE = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
PATIENCE = 240
IMPATIENT = """
import sys
from kvopt.cli import main
from kvopt.learning import descent_state
descent_state.SECONDS_BETWEEN_CHECKPOINTS = descent_state.WRITES_BETWEEN_CHECKPOINTS = 0.0
sys.exit(main())
"""
"""The command with a checkpoint after every step, as in runs that take long."""


def start(config, out):
    """``kvopt run`` in a process of its own, with Ctrl-C as a terminal has it (a background shell has it ignored)."""
    command = [sys.executable, "-c", IMPATIENT, "run", str(config), "--out", str(out), "--json"]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ALONE,
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(path, process):
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"no {path.name} after {PATIENCE} s"
        time.sleep(0.005)


def test_killed_anywhere_the_same_command_ends_in_the_same_bytes(tmp_path):
    config = write_job(tmp_path / "job")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "killing.py"), str(config), str(tmp_path / "runs")],
        capture_output=True, text=True, env=ALONE, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["differing"] == []
    killed = {kill["run"]: kill["at"] for kill in result["killed"]}
    for number, place in enumerate(killing.PLACES):
        assert place in killed[f"single-{number}"][0]
    assert all(len(killed[f"chain-{number}"]) >= 3 for number in range(killing.CHAINS))
    assert any(name.startswith("contexts/kv-best/") for name in result["artefacts"])


@pytest.fixture(scope="module")
def slow_job(tmp_path_factory):
    """A job whose first context takes long enough to be hit while it learns, and its uninterrupted run."""
    place = tmp_path_factory.mktemp("slow")
    config = write_job(place, lambda c: (c["contexts"][0].update(steps=120, eval_every=5), c["contexts"].pop()))
    run_job(config, place / "whole")
    return config, place / "whole"


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_process_hit_while_learning_goes_on_from_its_checkpoint(slow_job, tmp_path, sent):
    config, whole = slow_job
    process = start(config, tmp_path / "out")
    wait_for(tmp_path / "out" / ".state" / "kv-8.safetensors", process)
    process.send_signal(sent)
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert stdout == ""
    assert "Traceback" not in stderr
    if sent == signal.SIGINT:
        assert process.returncode == 130
        assert stderr.splitlines()[-1] == "interrupted; finished work is kept: run the same command again to go on"
    else:
        assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / "contexts" / "kv-8").exists()
    board = run_job(config, tmp_path / "out")
    assert [row["name"] for row in board["contexts"]].count("kv-8") == 1
    assert artefacts(tmp_path / "out") == artefacts(whole)
