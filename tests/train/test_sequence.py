"""Sequences of tasks: a stage starts where the last ended, pools are scored under the current student, R is right."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import yaml

from kvopt.config.document import load_config
from kvopt.config.sequence import load_sequence
from kvopt.config.students import StudentConfig
from kvopt.documents.schemas import schema_of
from kvopt.errors import InputError
from kvopt.train.gold import gold_nll
from kvopt.train.sequence.sequence import by_workers, conduct
from kvopt.train.sequence.tasks import SequenceTask, load_tasks, opened
from kvopt.train.sequence.transfer import transfer
from kvopt.train.stream import Stream
from kvopt.train.student import load_student, read_student_record
from kvopt.train.trainer import StudentTrainer
from kvopt.train.workers import Workers
from tests.jobs import entries, write_job
from tests.tiny import tiny_folder

COMMON = {"steps": 4, "batch_size": 4, "learning_rate": 0.01, "report_to": [], "lora": {"rank": 4}}
ARMS = [
    COMMON | {"name": "fixed", "contexts": ["original"]},
    COMMON
    | {
        "name": "adaptive",
        "contexts": ["original", "random-mutations:2"],
        "schedule": {"kind": "state-adaptive", "rows": 6},
    },
]


def write_sequence(folder: Path, change: Callable[[dict[str, Any]], object] | None = None) -> Path:
    """Two jobs that differ in rows and template, and a sequence over them."""
    folder.mkdir(parents=True, exist_ok=True)

    def second(config: dict[str, Any]) -> None:
        config["name"] = "again"
        config["data"]["only"] = {"text": "(?i)please"}
        config["template"]["messages"][0]["content"] = "Name the label of the message.\n\nLabels: weather, music, book."

    write_job(folder / "one", lambda c: c.update(name="first"))
    write_job(folder / "two", second)
    document: dict[str, Any] = {
        "name": "both",
        "stages": ["one/job.yaml", {"config": "two/job.yaml", "set": ["data.limit.selection=2"]}],
        "arms": deepcopy(ARMS),
        "evaluate": {"rows": 3, "max_new_tokens": 3, "metrics": ["exact-match", {"kind": "rouge-l"}]},
    }
    if change:
        change(document)
    path = folder / "sequence.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False), "utf-8")
    return path


def load(path: Path, out: Path) -> tuple[Any, list[SequenceTask]]:
    config, base_dir = load_sequence(path)
    return config, load_tasks(config, base_dir, out, say=lambda line: None, bars=False)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """A finished sequence: its file, its folder, its document."""
    place = tmp_path_factory.mktemp("sequence")
    path = write_sequence(place)
    config, tasks = load(path, place / "out")
    return path, place / "out", conducted(config, tasks, place / "out")


def conducted(config: Any, tasks: list[SequenceTask], out: Path) -> dict[str, Any]:
    return conduct(config, tasks, out).to_json()


def arm_of(document: dict[str, Any], name: str) -> dict[str, Any]:
    return next(arm for arm in document["arms"] if arm["name"] == name)


def test_r_holds_the_gold_nll_of_every_task_after_every_stage(done: Any) -> None:
    path, out, document = done
    _, tasks = load(path, out)
    base = tasks[0].run.load_base()
    assert document["tasks"] == ["first", "again"]
    for arm in ("fixed", "adaptive"):
        models = [base, *(load_student(task.folder(arm), base) for task in tasks)]
        for model, row in zip(models, arm_of(document, arm)["R"]["gold_nll"], strict=True):
            for task, value in zip(tasks, row, strict=True):
                rows = task.run.task().rows("validation")
                assert value == pytest.approx(gold_nll(model, task.run.task().original, rows).mean, rel=1e-5)


def test_the_file_is_valid_under_its_schema(done: Any) -> None:
    document = entries(done[1] / "sequence.json")
    assert document == done[2]
    jsonschema.validate(document, schema_of("sequence"))
    document["arms"][0]["R"]["gold_nll"][0][0] = "low"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema_of("sequence"))


def test_transfer_is_that_of_each_matrix(done: Any) -> None:
    document = done[2]
    assert set(document["headlines"]) <= set(document["quantities"])
    assert "gold_nll" in document["quantities"]
    for arm in document["arms"]:
        assert list(arm["R"]) == document["quantities"]
        for quantity, matrix in arm["R"].items():
            assert [len(row) for row in matrix] == [2, 2, 2]
            assert arm["transfer"][quantity] == transfer(matrix).document.to_json()


def test_arms_share_the_row_before_training(done: Any) -> None:
    first, second = done[2]["arms"]
    assert all(first["R"][quantity][0] == second["R"][quantity][0] for quantity in first["R"])
    assert first["R"]["gold_nll"][1] != first["R"]["gold_nll"][0]


def test_a_stage_starts_from_the_student_of_the_stage_before(done: Any) -> None:
    path, out, _ = done
    _, tasks = load(path, out)
    stored = [read_student_record(task.folder("fixed")) for task in tasks]
    before, record = (one.to_json() for one in stored if one is not None)
    assert record["settings"]["start"] == str(tasks[0].folder("fixed").resolve())
    assert before["settings"]["start"] is None
    assert record["seed"] == before["seed"] + 1
    base = tasks[0].run.load_base()
    task = tasks[1].run.task()
    stream = Stream(
        StudentConfig.model_validate(ARMS[0]).schedule, len(task.rows("train").rows), (1.0,), record["seed"]
    )
    first = [stream.row(position) for position in range(COMMON["batch_size"])]

    def loss_of_the_first_step(model: Any) -> float:
        nll = gold_nll(model, task.original, task.rows("train"))
        return float(nll.sums[first].sum() / nll.counts[first].sum())

    assert record["history"][0]["step"] == 1
    assert record["history"][0]["loss"] == pytest.approx(
        loss_of_the_first_step(load_student(tasks[0].folder("fixed"), base)), abs=1e-4
    )
    assert record["history"][0]["loss"] != pytest.approx(loss_of_the_first_step(base), abs=1e-2)


def test_the_pool_is_scored_under_the_student_that_the_stages_before_left(done: Any) -> None:
    path, out, document = done
    _, tasks = load(path, out)
    base = tasks[0].run.load_base()
    stages = arm_of(document, "adaptive")["stages"]
    with opened(tasks):
        pools = [{"original": t.run.task().original, **t.run.mutation_contexts()} for t in tasks]
    models = (base, load_student(tasks[0].folder("adaptive"), base))
    for model, task, contexts, stage in zip(models, tasks, pools, stages, strict=True):
        assert stage["contexts"][0] == "original"
        assert len(stage["contexts"]) == 3
        rows = task.run.task().rows("train").select([example.id for example in task.run.inputs.dataset.train][:6])
        for name, value in stage["gold_nll"].items():
            context = task.run.task().for_training(contexts[name])
            assert value == pytest.approx(gold_nll(model, context, rows).mean, rel=1e-4)
        assert stage["kept"] == [min(stage["gold_nll"], key=stage["gold_nll"].__getitem__)]


def test_what_is_there_is_not_done_again(done: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out, document = done
    before = (out / "sequence.json").read_bytes()
    monkeypatch.setattr(StudentTrainer, "compute_loss", None)
    monkeypatch.setattr("kvopt.train.evaluation.evaluate.generate", None)
    config, tasks = load(path, out)
    assert conducted(config, tasks, out) == document
    assert (out / "sequence.json").read_bytes() == before


class Killed(Exception):
    pass


def test_a_killed_and_resumed_sequence_ends_in_the_same_document(
    done: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _, document = done
    once, calls = StudentTrainer.compute_loss, []

    def fatal(self: StudentTrainer, *args: Any, **kwargs: Any) -> Any:
        calls.append(self.state.global_step)
        if len(calls) in (6, 14):
            raise Killed
        return once(self, *args, **kwargs)

    monkeypatch.setattr(StudentTrainer, "compute_loss", fatal)
    for _ in range(2):
        config, tasks = load(path, tmp_path / "out")
        with pytest.raises(Killed):
            conducted(config, tasks, tmp_path / "out")
        assert not (tmp_path / "out" / "sequence.json").exists()
        torch.manual_seed(1)
    config, tasks = load(path, tmp_path / "out")
    assert conducted(config, tasks, tmp_path / "out") == document


def test_a_changed_first_stage_trains_the_stages_behind_it_again(done: Any, tmp_path: Path) -> None:
    path = write_sequence(tmp_path, lambda d: d["arms"].pop())
    config, tasks = load(path, tmp_path / "out")
    first = conducted(config, tasks, tmp_path / "out")
    again = write_sequence(
        tmp_path,
        lambda d: (
            d["arms"].pop(),
            d["stages"].__setitem__(0, {"config": "one/job.yaml", "set": ["data.limit.train=9"]}),
        ),
    )
    config, tasks = load(again, tmp_path / "out")
    second = conducted(config, tasks, tmp_path / "out")
    hashes = [[s["weights_sha256"] for s in document["arms"][0]["stages"]] for document in (first, second)]
    assert hashes[0][0] != hashes[1][0]
    assert hashes[0][1] != hashes[1][1]


# the command


def test_the_command_prints_one_table_a_quantity_and_what_was_chosen(done: Any, kvopt: Any) -> None:
    path, out, document = done
    code, text, err = kvopt("sequence", path, "--out", out)
    assert code == 0, err
    for words in ("both · exact-match", "both · gold_nll", "AP", "BWT", "FWT", "adaptive", "again", "sequence.json"):
        assert words in text
    code, text, _ = kvopt("sequence", path, "--out", out, "--json")
    assert json.loads(text) == document


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(stage=[]), r"sequence\.yaml: unknown key 'stage' \(did you mean 'stages'\?\)"),
        (lambda d: d["arms"][0].update(step=3), r"unknown key 'arms\.0\.step' \(did you mean 'steps'\?\)"),
        (lambda d: d["arms"][1]["schedule"].update(row=3), r"unknown key 'arms\.1\.schedule\.row' .*'rows'"),
        (lambda d: d["stages"][1].update(sets=[]), r"unknown key 'stages\.1\.sets' .*'set'"),
        (lambda d: d.update(stages=[]), r"stages: List should have at least 1 item"),
        (lambda d: d.update(stages=["one/job.yaml", "nothing.yaml"]), r"nothing\.yaml: no such file"),
        (lambda d: d.update(stages=["one/job.yaml"] * 2), r"stages\.1 one/job\.yaml: two tasks are named 'first'"),
        (lambda d: d["arms"].append(d["arms"][0]), r"two arms are named 'fixed'"),
        (lambda d: d["arms"][0].update(contexts=["kv-9"]), r"students\.fixed\.contexts: no context 'kv-9'"),
        (lambda d: d["arms"][0].update(start="nowhere"), r"nowhere: is not a student folder"),
        (lambda d: d["arms"][0].update(own_answers={"accept": ["python:nothing.py:f"]}), r"nothing\.py"),
        (lambda d: d["arms"][0].update(contexts=["best-mutations:99"]), r"wants more mutations than mutations\.count"),
        (
            lambda d: d["stages"][1].update(set=[f"model.base={tiny_folder('qwen3')}"]),
            r"stages\.1 two/job\.yaml: its model section differs from that of one/job\.yaml",
        ),
        (lambda d: d["stages"][1].update(set=["data.only={text: zzz}"]), r"data\.only leaves no row"),
        (lambda d: d["evaluate"].update(metrics=["exact"]), r"evaluate\.metrics"),
    ],
)
def test_wrong_input_is_one_line_before_any_work(kvopt: Any, tmp_path: Path, change: Any, message: str) -> None:
    code, out, err = kvopt("sequence", write_sequence(tmp_path / "s", change), "--out", "out")
    assert code == 2, err
    assert out == ""
    assert re.search(message, err.splitlines()[-1]), err
    assert not (tmp_path / "out").exists()


def test_several_processes_are_refused(done: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    config, tasks = load(done[0], tmp_path)
    with pytest.raises(InputError, match="runs in one process"):
        conducted(config, tasks, tmp_path)


@pytest.mark.slow
def test_workers_take_arms_through_the_same_stages(done: Any, tmp_path: Path) -> None:
    path, out, document = done
    config, base_dir = load_sequence(path)
    config, tasks = load(path, tmp_path / "out")
    side_by_side = by_workers(config, base_dir, tmp_path / "out", Workers(2), tasks[0].run.at.progress)
    assert conduct(config, tasks, tmp_path / "out", side_by_side).to_json() == document
    assert (tmp_path / "out" / "sequence.json").read_bytes() == (out / "sequence.json").read_bytes()
    assert not list((tmp_path / "out").rglob(".workers"))


def test_the_sequence_that_comes_with_kvopt_divides_the_intents_between_its_tasks() -> None:
    folder = Path(__file__).parents[2] / "configs"
    config, base_dir = load_sequence(folder / "snips-sequence.yaml")
    assert base_dir == folder
    intents = ["AddToPlaylist", "BookRestaurant", "GetWeather", "PlayMusic", "RateBook", "SearchCreativeWork"]
    intents += ["SearchScreeningEvent"]
    tasks = [load_config(folder / stage.config)[0] for stage in config.stages]
    rows = [json.dumps({"intent": intent, "slots": {}}) for intent in intents]
    for row, intent in zip(rows, intents, strict=True):
        taking = [task for task in tasks if re.search(task.data.only["output"], row)]
        assert len(taking) == 1
        (template,) = [m.content for m in taking[0].template.messages or [] if m.role == "system"]
        assert f"- {intent}:" in template
    assert [arm.schedule.kind for arm in config.arms] == ["resample", "state-adaptive"]
