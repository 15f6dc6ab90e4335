"""What a state-adaptive schedule chooses is the same in every process of a launch; after a stop it is, too
(``test_trainer.py``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = ("original", "other", "none", "kv", "soft")


def trained(folder: Path, processes: int) -> list[dict[str, object]]:
    """The scorings of the pool, as each process has them, and a hash of its student."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [sys.executable, *launch, "-m", "tests.train.test_state_adaptive", str(folder)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.slow
def test_processes_that_round_otherwise_train_on_what_the_first_one_chose(tmp_path: Path) -> None:
    (alone,) = trained(tmp_path / "one", 1)
    first, second = trained(tmp_path / "two", 2)
    assert first == second, "the second saw the losses in the opposite order"
    for mine, wanted in zip(first["stages"], alone["stages"], strict=True):  # type: ignore[call-overload]
        assert (mine["step"], mine["kept"]) == (wanted["step"], wanted["kept"])
        assert mine["gold_nll"] == pytest.approx(wanted["gold_nll"], abs=1e-4)


def main() -> None:
    """One process: train a student whose pool it scores itself."""
    import torch

    from kvopt.base.launch import LAUNCH
    from kvopt.storage.files import sha256_bytes, write_json
    from kvopt.train.pool import PoolContext
    from kvopt.train.trainer import StudentTrainer, train_student
    from tests.tasks import make_task
    from tests.tiny import tiny_base, tiny_folder
    from tests.train.pools import job, pool, weights

    torch.set_num_threads(1)
    tiny_folder("llama")  # while this process is alone: in a launch only the first one would write the files
    LAUNCH.start("cpu")
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    if rank:
        once = StudentTrainer._gold_nll

        def opposite(self: StudentTrainer, item: PoolContext, rows: int) -> float:
            return -once(self, item, rows)

        StudentTrainer._gold_nll = opposite  # type: ignore[method-assign]
    task = make_task(tiny_base("llama"), folder / f"reference-{rank}")
    settings = {"steps": 4, "learning_rate": 0.01, "schedule": {"kind": "state-adaptive", "every": 2, "rows": 6}}
    done = train_student(job(task, folder / "student", pool(task, *NAMES), **settings))
    student = {name: sha256_bytes(p.numpy().tobytes()) for name, p in weights(done.student).items()}
    write_json(folder / f"{rank}.json", {"stages": done.stages, "student": student})


if __name__ == "__main__":
    main()
