"""``score.select``: mutations and checkpoints chosen by the gold NLL or by a metric of the config."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from kvopt.config.document import load_config
from kvopt.errors import InputError
from kvopt.run.run import Run
from tests.jobs import write_job

METRIC = {"kind": "regex", "name": "an-e", "pattern": "e"}
"""Some answers of a random model have the letter, others have not."""


def open_job(path: Path, out: Path) -> Run:
    config, base_dir = load_config(path)
    return Run(config, base_dir, out, say=lambda line: None, bars=False)


def selecting(select: str) -> Any:
    def change(config: dict[str, Any]) -> None:
        config["score"]["select"] = select
        config["mutations"]["count"] = 6
        config["data"]["limit"]["selection"] = 6
        config["evaluate"] = {"max_new_tokens": 5, "metrics": [METRIC]}

    return change


def share_with_e(run: Run, name: str) -> float:
    """By the answers' file alone."""
    lines = (run.directory / "answers" / f"{name}.selection.jsonl").read_text("utf-8").splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    assert len(answers) == len(run.task().dataset.selection)
    return sum("e" in answer for answer in answers) / len(answers)


def test_mutations_are_ordered_by_the_metric_and_ties_by_kl(tmp_path: Path) -> None:
    with open_job(write_job(tmp_path, selecting("an-e")), tmp_path / "out").opened() as run:
        ranked = run.ranked_mutations()
        places = [(-share_with_e(run, c.name), score.kl_forward.mean) for c, score in ranked]
        assert len(places) == 6
        assert places == sorted(places)
        assert len({share for share, _ in places}) > 1, "the metric tells some of them apart"
        assert [kl for _, kl in places] != sorted(kl for _, kl in places), "the order is not that of the KL"


def test_mutations_are_ordered_by_gold_nll(tmp_path: Path) -> None:
    with open_job(write_job(tmp_path, selecting("gold_nll")), tmp_path / "out").opened() as run:
        values = [score.gold_nll.mean for _, score in run.ranked_mutations()]
        assert values == sorted(values)


@pytest.mark.parametrize("select", ["gold_nll", "an-e"])
def test_the_checkpoint_with_the_best_value_is_kept(tmp_path: Path, select: str) -> None:
    with open_job(write_job(tmp_path, selecting(select)), tmp_path / "out").opened() as run:
        run.learned(["kv-8"])
        record = json.loads((run.directory / "contexts/kv-8/kvopt.json").read_text("utf-8"))
        history = record["history"]
        assert [point["step"] for point in history] == [0, 2, 4, 6]
        best = min(history, key=lambda point: (point["chosen_by"], point["held_out_kl"]))
        assert record["best_step"] == best["step"]
        assert all(math.isfinite(point["chosen_by"]) for point in history)
        kept = next(point for point in history if point["step"] == record["best_step"])
        context = run.learned(["kv-8"])[0]
        score = run.score(context, "selection")
        assert score.kl_forward.mean == pytest.approx(kept["held_out_kl"], abs=1e-6), "the tensor is of that step"
        if select == "an-e":
            answers = run.task_metrics().answers(context, "selection").texts
            assert kept["chosen_by"] == -sum("e" in answer for answer in answers) / len(answers)


def test_choosing_otherwise_learns_again(tmp_path: Path) -> None:
    keys = []
    for select in ("kl", "gold_nll"):
        with open_job(write_job(tmp_path, selecting(select)), tmp_path / "out").opened() as run:
            run.learned(["kv-8"])
        keys.append(json.loads((tmp_path / "out/contexts/kv-8/kvopt.json").read_text("utf-8"))["key"])
    assert keys[0] != keys[1]


@pytest.mark.parametrize("select", ["exact-match", "kl_forward"])
def test_what_is_not_measured_cannot_choose(tmp_path: Path, select: str) -> None:
    with pytest.raises(InputError, match=f"score.select '{select}' is not measured .known: kl, gold_nll, an-e;"):
        load_config(write_job(tmp_path, selecting(select)))
