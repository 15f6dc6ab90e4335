"""What kvopt 0.1.0 wrote before its modules moved is read, taken as it is, and gone on with (``tests/data``)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kvopt.base.loading import load_base
from kvopt.config.document import load_config
from kvopt.contexts import KVContext, SoftContext, load_context
from kvopt.learning.starts.matched import Matched
from kvopt.report import write_report
from kvopt.run import descend, stages
from kvopt.run.run import Run
from kvopt.train.commands import conduct_study, evaluate_all, train_students
from kvopt.train.student import load_student

OLDER = Path(__file__).resolve().parents[1] / "data" / "run-0.1.0"


@pytest.fixture
def older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that may be changed, for a kvopt whose starts are those of then."""
    monkeypatch.setattr(Matched, "version", 1)
    return Path(shutil.copytree(OLDER, tmp_path / "older"))


def open_run(folder: Path, lines: list[str] | None = None) -> Run:
    config, base_dir = load_config(folder / "kvopt.yaml")
    say: Callable[[str], None] = (lambda line: None) if lines is None else lines.append
    return Run(config, base_dir, folder / "run", say=say, bars=False)


def document(path: Path) -> dict[str, Any]:
    """A JSON file without what names the place of the base, and without what results stand on, which is newer."""
    value = json.loads(path.read_text("utf-8"))
    for name in ("base", "stands_on", "search", "checksum"):
        value.pop(name, None)
    return value


def sampled(samples: dict[str, Any]) -> list[Any]:
    """Which examples ``samples.json`` shows, and under which contexts."""
    return [(one["id"], one["place"], one["values"], one["gold"], list(one["contexts"])) for one in samples["examples"]]


def ledger(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "ledger.jsonl").read_text("utf-8").splitlines()]


def test_a_finished_run_is_taken_as_it_is(older: Path) -> None:
    names = ("leaderboard.json", "samples.json", "study.json", "students/lora/evaluation.json")
    before = {name: document(older / "run" / name) for name in names}
    lines: list[str] = []
    with open_run(older, lines).opened() as run:
        run.run()
    train_students(open_run(older, lines))
    with open_run(older, lines).opened() as run:
        evaluate_all(run)
        conduct_study(run)
    new = ("answers/", *(f"scores/{name}.selection" for name in ("none", "kv-6", "soft-5")))
    kept, there = (
        [entry for entry in ledger(folder) if not entry["stage"].startswith(new)]
        for folder in (older, OLDER.parent / "run-0.1.0")
    )
    kept.remove([entry for entry in kept if entry["stage"] == "samples"][-1])  # samples show answers, which are new
    assert len(kept) == len(there), "nothing was computed again"
    assert [line for line in lines if line.endswith("trained already")]
    for name, value in before.items():
        after = document(older / "run" / name)
        if name == "study.json":  # its intervals over rows are drawn in another way since
            assert [arm["name"] for arm in after["arms"]] == [arm["name"] for arm in value["arms"]]
        elif name == "samples.json":
            assert sampled(after) == sampled(value)
        elif name == "leaderboard.json":  # it has the metrics of the base's answers since
            assert after.pop("headlines") == ["exact-match", "json-valid"]
            assert after.pop("answered") > 0
            assert all(row.pop("metrics") for row in after["contexts"])
            assert after.pop("recommended") in {row["name"] for row in after["contexts"]}
            assert after.pop("picking") >= 0
            for row in (
                *after["contexts"],
                *value["contexts"],
            ):  # chosen and compared in another way since
                for key in ("selection", "difference", "separable_from_best"):
                    row.pop(key, None)
            assert after == value, name
        else:
            for context in after["contexts"]:  # what is kept, and how near the best the others are, came later
                assert context.pop("retention") is not None
            for quantity in [q for group in after["groups"] for q in group["quantities"].values()]:
                quantity.pop("near_best", None)
                quantity.pop("retention", None)
            assert after == value, name


def test_a_context_whose_start_is_another_now_is_made_again_and_the_old_one_kept(
    older: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Matched, "version", 2)
    before = (older / "run/contexts/soft-5/adapter_model.safetensors").read_bytes()
    lines: list[str] = []
    with open_run(older, lines).opened() as run:
        run.learned()
    assert (older / "run/contexts/soft-5/adapter_model.safetensors").read_bytes() == before
    assert sum(line.startswith("put aside: contexts/kv-6") for line in lines) == 1
    assert len(list((older / "run/.kept").glob("contexts-kv-6-*/contexts/kv-6/kvopt.json"))) == 1


def test_its_context_and_student_folders_are_read(older: Path) -> None:
    config, _ = load_config(older / "kvopt.yaml")
    base = load_base(config.model)
    kv, soft = (load_context(older / "run" / "contexts" / name, base) for name in ("kv-6", "soft-5"))
    assert isinstance(kv, KVContext)
    assert isinstance(soft, SoftContext)
    assert (kv.tokens, soft.tokens) == (6, 5)
    student = load_student(older / "run" / "students" / "lora", base)
    assert any("lora" in name for name, _ in student.model.named_parameters())


def test_its_page_can_be_written(older: Path, tmp_path: Path) -> None:
    _, written = write_report([older / "run"], tmp_path / "page")
    html = (tmp_path / "page" / "report.html").read_text("utf-8")
    assert "kv-6" in html
    assert "anchored" in html
    assert len(written) == 4


def test_a_descent_is_gone_on_with_from_its_checkpoint(older: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = load_file(older / "run" / "contexts" / "kv-6" / "adapter_model.safetensors")["prompt_embeddings"]
    config, _ = load_config(older / "kvopt.yaml")
    learned = load_context(older / "run" / "contexts" / "kv-6", load_base(config.model))
    monkeypatch.setattr(descend, "initial_tensor", lambda start, task: learned.tensor)  # its first slot is frozen
    shutil.rmtree(older / "run" / "contexts" / "kv-6")
    shutil.copytree(older / "state", older / "run" / ".state", dirs_exist_ok=True)
    steps: list[int] = []
    monkeypatch.setattr(stages, "step_reporter", lambda bar: lambda step, train, held_out: steps.append(step))
    with open_run(older).opened() as run:
        (context,) = run.learned(["kv-6"])
    assert steps == [3, 4, 5, 6], "the checkpoint of step 3 was taken up"
    torch.testing.assert_close(context.tensor.flatten(1), stored, rtol=1e-4, atol=1e-5)


def test_a_student_is_gone_on_with_from_its_checkpoint(older: Path) -> None:
    name = "adapter_model.safetensors"
    stored = load_file(older / "run" / "students" / "lora" / name)
    shutil.rmtree(older / "run" / "students" / "lora")
    shutil.copytree(older / "training", older / "run" / ".training", dirs_exist_ok=True)
    train_students(open_run(older), ["lora"])
    (entry,) = [line for line in ledger(older) if line["stage"] == "students/lora"][1:]
    assert entry["resumed_from"] == 2
    trained = load_file(older / "run" / "students" / "lora" / name)
    assert trained.keys() == stored.keys()
    for key, tensor in trained.items():
        torch.testing.assert_close(tensor, stored[key], rtol=1e-3, atol=1e-5)
