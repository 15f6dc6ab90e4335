"""Studies: which arms a grid has, what they are trained with, and the document that compares them."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pytest
import yaml
from rich.console import Console

from kvopt import cli
from kvopt.config.document import load_config
from kvopt.config.students import StudentConfig
from kvopt.documents.evaluation_file import EvaluationDocument
from kvopt.documents.manifest import RunManifest
from kvopt.documents.student_record import StudentRecord
from kvopt.documents.study_file import StudyDocument
from kvopt.errors import InputError, KvoptError
from kvopt.run.directory import RunDirectory
from kvopt.train.arms import study_arms, trained_students
from kvopt.train.commands import conduct_study, study_runner
from kvopt.train.evaluation.conditions import held_out_mutations
from kvopt.train.evaluation.models import subject
from kvopt.train.pool import build_pool
from kvopt.train.study import values
from kvopt.train.study.summary import Result
from kvopt.train.study.tables import tables
from kvopt.train.training import contexts_of
from kvopt.train.workers import Workers
from tests.jobs import artefacts, entries, stages_in
from tests.tiny import tiny_folder
from tests.train.evaluated import open_evaluated, student, write_evaluated


def write_study(folder, change=None):
    """Two arms and a curve of 0 and 1, two seeds."""

    def study(config):
        config["students"] = [student("plain", "original"), student("kv", "kv-8")]
        config["study"] = {"seeds": [0, 5], "curve": {"counts": [0, 1]}, "equal_seconds": ["kv"]}
        config["evaluate"] |= {"templates": None, "frozen": None, "held_out_mutations": 6, "metrics": ["rouge-l"]}
        if change:
            change(config)

    return write_evaluated(folder, study)


def loaded(folder, change=None):
    return load_config(write_study(folder, change))[0]


def conducted(config, out):
    run = open_evaluated(config, out)
    with run.opened():
        return conduct_study(run).to_json()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(config, run directory, document); do not change them, copy them."""
    place = tmp_path_factory.mktemp("study")
    config = write_study(place)
    return config, place / "out", conducted(config, place / "out")


def arm(document, name, budget="steps"):
    return next(row for row in document["arms"] if (row["name"], row["budget"]) == (name, budget))


def test_arms_are_the_students_the_curve_and_those_at_equal_seconds(tmp_path):
    arms = study_arms(loaded(tmp_path))
    assert [(a.name, a.budget, a.mutations) for a in arms] == [
        ("plain", "steps", 0), ("kv", "steps", None), ("curve-1", "steps", 1), ("kv", "seconds", None),
    ]  # fmt: skip
    assert [choice.context for choice in arms[2].config.contexts] == ["original", "best-mutations:1"]
    assert arms[2].config.learning_rate == 0.01
    assert arms[3].student(5, steps=7).name == "kv--seconds--seed-5"
    assert arms[3].student(5, steps=7).steps == 7
    assert arms[0].student(5).seed == 5


def test_an_arm_that_is_a_point_of_the_curve_is_not_trained_twice(tmp_path):
    def nested(config):
        config["students"].append(student("two", "original", "best-mutations:2"))
        config["study"]["curve"]["counts"] = [0, 1, 2]

    arms = study_arms(loaded(tmp_path, nested))
    assert {a.mutations: a.name for a in arms if a.mutations is not None} == {0: "plain", 1: "curve-1", 2: "two"}


@pytest.mark.parametrize("order", ["random", "diverse"])
def test_the_mutations_of_the_curve_come_in_the_order_that_the_config_says(tmp_path, order):
    arms = study_arms(loaded(tmp_path, lambda c: c["study"]["curve"].update(context_order=order)))
    assert arms[2].config.contexts[1].context == f"{order}-mutations:1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["study"].update(arms=["plain", "nobody"]), r"study\.arms: no arm 'nobody' \(known: plain, kv\)"),
        (lambda c: c["study"].update(reference="nobody"), r"study\.reference: no arm 'nobody'"),
        (lambda c: c["study"].update(equal_seconds=["nobody"]), r"study\.equal_seconds: no arm 'nobody'"),
        (lambda c: c["study"]["curve"].update(like="nobody"), r"study\.curve\.like: no arm 'nobody'"),
        (lambda c: c["students"][1].update(steps=4), r"do not have equal steps \(plain: 3, kv: 4\)"),
        (lambda c: c["study"].update(budget="tokens"), r"do not have equal tokens \(plain: none, kv: none\)"),
        (lambda c: c["study"].update(amount=2.5), r"study\.amount: 2\.5 steps is not a whole number"),
        (lambda c: c.update(students=[], study={}), "has no students to compare"),
        (lambda c: c.pop("study"), "has no study section"),
    ],
)
def test_a_grid_that_cannot_be_is_named(tmp_path, change, message):
    config = loaded(tmp_path, change)
    with pytest.raises(InputError, match=message):
        study_arms(config)


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ({"seeds": [0, 0]}, "study.seeds: must be different numbers"),
        ({"seeds": []}, "study.seeds"),
        ({"curve": {"counts": [2, 1]}}, "study.curve.counts: must be rising numbers"),
        ({"budgets": "steps"}, "unknown key 'study.budgets' (did you mean 'budget'?)"),
    ],
)
def test_a_study_section_that_is_wrong_is_named(tmp_path, study, message):
    with pytest.raises(InputError) as caught:
        loaded(tmp_path, lambda c: c.update(study=study))
    assert message in str(caught.value)


def test_an_amount_gives_every_arm_the_same_budget(tmp_path):
    def by_tokens(config):
        config["students"][1]["steps"] = 9
        config["study"] = {"budget": "tokens", "amount": 500}

    arms = study_arms(loaded(tmp_path, by_tokens))
    assert {(a.config.steps, a.config.tokens) for a in arms} == {(None, 500)}


def test_epochs_that_no_arm_sets_are_one(tmp_path):
    def by_epochs(config):
        for one in config["students"]:
            del one["steps"]
        config["study"] = {"budget": "epochs"}

    assert len(study_arms(loaded(tmp_path, by_epochs))) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"loss": {"kind": "on-policy", "teacher": {"base": str(tiny_folder("gemma3"))}}},
            r"students\.odd\.loss\.teacher\.base: the teacher '.*gemma3.*' and the student's base '.*llama",
        ),
        ({"own_answers": {"accept": ["python:nothing.py:check"]}}, r"nothing\.py"),
        ({"start": "nowhere"}, "nowhere: is not a student folder"),
        ({"contexts": ["kv-9"]}, r"students\.odd\.contexts: no context 'kv-9'"),
    ],
)
def test_an_arm_that_cannot_be_trained_is_named_before_any_work(tmp_path, settings, message):
    config = write_study(tmp_path, lambda c: c["students"].append(student("odd", "original") | settings))
    with pytest.raises(InputError, match=message):
        conducted(config, tmp_path / "out")
    assert not (tmp_path / "out" / "students").exists()
    assert not (tmp_path / "out" / "mutations.jsonl").exists()


def test_every_arm_is_trained_with_every_seed_and_evaluated(finished):
    _, out, document = finished
    assert document["complete"]
    assert entries(out / "study.json") == document
    assert [(row["name"], row["budget"], len(row["runs"])) for row in document["arms"]] == [
        ("plain", "steps", 2), ("kv", "steps", 2), ("curve-1", "steps", 2), ("kv", "seconds", 2),
    ]  # fmt: skip
    for row in document["arms"]:
        for run in row["runs"]:
            folder = out / "students" / run["student"]
            record = json.loads((folder / "kvopt-student.json").read_text("utf-8"))
            assert record["seed"] == run["seed"]
            assert record["steps"] == run["steps"]
            assert record["tokens"] == run["tokens"] > 0
            evaluation = json.loads((folder / "evaluation.json").read_text("utf-8"))
            group = next(g for g in evaluation["groups"] if g["group"] == "held-out")
            assert run["values"]["held-out/gold_nll"] == group["quantities"]["gold_nll"]["mean"]
            assert run["seconds"] > 0


def test_arms_at_equal_steps_have_them_and_the_reference_is_not_compared_with_itself(finished):
    _, _, document = finished
    assert {row["steps"] for row in document["arms"] if row["budget"] == "steps"} == {3}
    assert arm(document, "plain")["against_reference"] is None
    compared = arm(document, "kv")["against_reference"]["original/gold_nll"]
    of_seeds = [arm(document, name)["values"]["original/gold_nll"]["seeds"] for name in ("kv", "plain")]
    assert compared["difference"]["seeds"] == [a - b for a, b in zip(*of_seeds, strict=True)]


def test_a_draw_that_takes_every_row_once_gives_the_values_of_the_evaluation(finished, monkeypatch, tmp_path):
    config, out, _ = finished
    shutil.copytree(out, tmp_path / "out")
    monkeypatch.setattr(values, "row_draws", lambda examples, seed, resamples: np.ones((1, examples)))
    run = open_evaluated(config, tmp_path / "out")
    with run.opened():
        study = study_runner(run)
        measured = study.evaluator.measure(subject(run.task(), "kv--seed-5", run.at))
        evaluation = study.evaluator.document(subject(run.task(), "kv--seed-5", run.at), measured)
    draws = values.draws_by_path(measured, seed=0, resamples=1)
    expected = values.by_path(evaluation)
    assert {"held-out/gold_nll", "held-out/gold_nll/spread", "wordings/consistency", "original/rouge-l",
            "forgetting/kl_from_base", "no_context/looks_like_task"} <= set(expected)  # fmt: skip
    for path, value in expected.items():
        assert draws[path].tolist() == pytest.approx([float("nan") if value is None else value], nan_ok=True), path


def test_intervals_over_rows_and_seeds_hold_the_mean_and_pair_the_rows(finished):
    _, _, document = finished
    for row in document["arms"]:
        low, high = row["values"]["original/gold_nll"]["ci95_bootstrap"]
        assert low < row["values"]["original/gold_nll"]["mean"] < high
    near = arm(document, "curve-1")  # nearly the reference's own students: what rows vary cancels
    difference = near["against_reference"]["original/gold_nll"]["difference"]
    (low, high), alone = difference["ci95_bootstrap"], near["values"]["original/gold_nll"]["ci95_bootstrap"]
    assert low <= difference["mean"] <= high
    assert high - low < 0.8 * (alone[1] - alone[0])  # drawn apart, the rows would make it 1.4 times as wide


def test_no_arm_was_trained_on_what_is_held_out(finished):
    _, out, document = finished
    students = [run["student"] for row in document["arms"] for run in row["runs"]]
    trained = set()
    for name in students:
        record = json.loads((out / "students" / name / "kvopt-student.json").read_text("utf-8"))
        trained |= {context["name"] for context in record["contexts"]}
    evaluation = json.loads((out / "students" / students[0] / "evaluation.json").read_text("utf-8"))
    held_out = next(g["contexts"] for g in evaluation["groups"] if g["group"] == "held-out")
    assert len(held_out) == 5  # of six mutations, the curve is trained on one
    assert not trained & set(held_out)


def test_an_arm_twice_as_fast_gets_twice_the_steps_and_keeps_them(finished, tmp_path):
    config, out, _ = finished
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out" / "study-steps.json").unlink()
    run = open_evaluated(config, tmp_path / "out")
    with run.opened():
        study = study_runner(run)
        plain, kv, _, timed = study.arms

        def result(of, seconds):
            record = StudentRecord(name=of.name, key=of.name, steps=10)
            return Result(of, 0, record, seconds, EvaluationDocument(name=of.name), 0.0, 0.0)

        assert study._steps_in_time(timed, 0, {"plain": result(plain, 30.0), "kv": result(kv, 15.0)}) == 20
        assert study._steps_in_time(timed, 0, {"plain": result(plain, 30.0), "kv": result(kv, 99.0)}) == 20
        with pytest.raises(KvoptError, match="the ledger does not say how long kv took"):
            study._steps_in_time(timed, 5, {"plain": result(plain, 30.0), "kv": result(kv, None)})


def test_steps_at_equal_seconds_follow_from_the_pace_of_both_arms(finished):
    _, out, document = finished
    kept = json.loads((out / "study-steps.json").read_text("utf-8"))
    for i, run in enumerate(arm(document, "kv", "seconds")["runs"]):
        own, reference = arm(document, "kv")["runs"][i], arm(document, "plain")["runs"][i]
        expected = max(1, int(reference["seconds"] / (own["seconds"] / own["steps"])))
        assert run["steps"] == expected == kept[run["student"]]["steps"]


def test_a_second_study_does_nothing_again_and_leaves_the_same_bytes(finished, tmp_path):
    config, out, document = finished
    shutil.copytree(out, tmp_path / "out")
    lines = (tmp_path / "out" / "ledger.jsonl").read_bytes()
    assert conducted(config, tmp_path / "out") == document
    assert (tmp_path / "out" / "ledger.jsonl").read_bytes() == lines
    assert artefacts(tmp_path / "out") == artefacts(out)


def test_what_a_kill_left_undone_is_done_and_ends_in_the_same_bytes(finished, tmp_path):
    config, out, document = finished
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    shutil.rmtree(copy / "students" / "curve-1--seed-5")
    (copy / "students" / "kv--seed-0" / "evaluation.json").unlink()
    (copy / "study.json").unlink()
    before = len(stages_in(copy))
    again = conducted(config, copy)
    assert {stage.split("/")[1] for stage in stages_in(copy)[before:]} == {"curve-1--seed-5"}
    for a, b in zip(again["arms"], document["arms"], strict=True):
        assert a["values"] == b["values"]
    for name, data in artefacts(out).items():
        if name.startswith("students/"):
            assert artefacts(copy)[name] == data


def test_the_curve_and_the_sweep_are_over_the_students(finished):
    _, _, document = finished
    curve = document["curve"]["original/rouge-l"]
    assert curve["counts"] == [0, 1]
    assert (
        document["curve"]["original/gold_nll"]["values"]["1"]
        == arm(document, "curve-1")["values"]["original/gold_nll"]["seeds"]
    )
    assert curve["values"]["0"] == arm(document, "plain")["values"]["original/rouge-l"]["seeds"]
    assert document["sweep"]["task_kl_to_probe_kl"]["points"] == 8
    assert document["sweep"]["context_kl_to_probe_kl"]["points"] == 4
    assert abs(arm(document, "plain")["runs"][0]["context_kl"]) < 1e-6
    assert arm(document, "kv")["runs"][0]["context_kl"] > 1e-3


def test_mutations_of_every_arm_and_seed_are_kept_from_the_held_out_ones(tmp_path):
    def random(config):
        config["students"].append(student("drawn", "original", "random-mutations:2"))
        config["evaluate"]["held_out_mutations"] = 6

    run = open_evaluated(write_study(tmp_path, random), tmp_path / "out")
    with run.opened():
        trained = trained_students(run.config)
        catalogue = run.catalogue(contexts_of(run.inputs, trained))
        held_out = {c.name for c in held_out_mutations(catalogue, run.config.evaluate, trained)}
        used = set()
        for config in trained:
            used |= {item.name for item in build_pool(catalogue, config, config.seed or 0).contexts}
    assert len({c.seed for c in trained if c.name.startswith("drawn--")}) == 2
    assert held_out
    assert not held_out & used


def test_the_study_that_comes_with_snips_is_a_whole_grid():
    from tests.test_configs import CONFIGS

    config, _ = load_config(CONFIGS / "snips-study.yaml")
    arms = study_arms(config)
    assert len({a.config.steps for a in arms}) == 1
    assert {a.mutations for a in arms if a.mutations is not None} == {0, 1, 2, 4, 8}
    largest = 4 * len(config.study.seeds) + 4 + 8  # random, diverse, best
    assert config.mutations.count >= largest + config.evaluate.held_out_mutations
    template = yaml.safe_load((CONFIGS / "snips.yaml").read_text("utf-8"))["template"]["messages"]
    assert [m.model_dump() for m in config.template.messages] == template
    assert all(isinstance(a.config, StudentConfig) for a in arms)


def test_quantities_are_shown_as_a_metric_names_them(finished):
    document = StudyDocument.model_validate_json(json.dumps(finished[2]).replace("rouge-l", "own.[/x]"))
    console = Console(file=io.StringIO(), width=400)
    for table in tables(document):
        console.print(table)
    assert console.file.getvalue().count("own.[/x]") > 3  # titles, headings and the curve


def test_the_command_shows_tables_or_one_document(finished, capsys, monkeypatch, tmp_path):
    config, out, document = finished
    shutil.copytree(out, tmp_path / "out")
    for arguments in ([], ["--json"]):
        monkeypatch.setattr("sys.argv", ["kvopt", "study", str(config), "--out", str(tmp_path / "out"), *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        printed = capsys.readouterr().out
        assert end.value.code == 0
        if arguments:
            assert json.loads(printed) == document
        else:
            assert "not separable from plain" in " ".join(printed.split())
            assert "curve-1" in printed
            assert "differences from plain" in printed
            assert "· gold_nll" in printed
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "curve-1" in page
    assert "Differences from plain" in page
    assert "loss without a context by arm" in page
    names = [row["name"] for row in json.loads((tmp_path / "out" / "leaderboard.json").read_text("utf-8"))["contexts"]]
    assert {"original", "none", "kv-8"} <= set(names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["study"].update(reference="nobody"), "study.reference: no arm 'nobody'"),
        (lambda c: c["evaluate"].update(templates="nothing.yaml"), "nothing.yaml: no such file"),
        (lambda c: c["study"].update(evaluate={"probes": {"file": "nothing.jsonl"}}), "nothing.jsonl: no such file"),
    ],
)
def test_what_is_wrong_is_one_line_before_any_model_is_loaded(kvopt, tmp_path, change, message):
    code, out, err = kvopt("study", write_study(tmp_path / "job", change), "--out", "out")
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert "base:" not in err


def test_an_arm_that_cannot_be_trained_is_told_before_contexts_are_learned(kvopt, tmp_path):
    config = write_study(tmp_path / "job", lambda c: c["students"].append(student("odd", "original", start="nowhere")))
    code, _, err = kvopt("study", config, "--out", "out")
    assert code == 2
    assert "nowhere: is not a student folder" in err.splitlines()[-1]
    assert not (tmp_path / "out" / "mutations.jsonl").exists()


def test_arms_that_come_to_the_same_contexts_are_named_before_any_is_trained(tmp_path):
    def change(config):
        config["mutations"]["count"] = 8
        config["evaluate"]["held_out_mutations"] = 2
        config["students"] = [student("near", "best-mutations:2"), student("far", "diverse-mutations:2")]
        config["students"].append(student("again", "original", "best-mutations:2"))
        config["students"].append({**student("twin", "best-mutations:2", "original"), "log_every": 3})
        del config["study"]["curve"], config["study"]["equal_seconds"]

    with pytest.raises(InputError, match=r"study\.arms: again and twin are the same student: m\d+, m\d+, original"):
        conducted(write_study(tmp_path, change), tmp_path / "out")
    assert not (tmp_path / "out" / "students").exists()


def test_quantities_of_the_curve_that_nothing_measures_are_told_before_an_arm_is_trained(tmp_path):
    config = write_study(tmp_path, lambda c: c["study"]["curve"].update(quantities=["orignal/rouge-l"]))
    with pytest.raises(InputError, match=r"nothing is measured as 'orignal/rouge-l' \(did you mean 'original/rouge-l'"):
        conducted(config, tmp_path / "out")
    assert not list((tmp_path / "out" / "students").glob("*--seed-*"))


@pytest.mark.parametrize("name", ["curve-1", "kv--seed-5", "kv--seconds"])
def test_students_that_would_be_trained_into_one_folder_are_refused(tmp_path, name):
    config = loaded(tmp_path, lambda c: c["students"].append(student(name, "none")))
    with pytest.raises(InputError, match=r"named '(curve-1--seed-0|kv--seed-5|kv--seconds--seed-0)'"):
        study_arms(config)


def test_workers_make_the_bytes_of_one_process_in_one_run_directory(finished, tmp_path):
    _, out, document = finished
    shutil.copytree(out, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "students")
    run = open_evaluated(write_study(tmp_path / "job"), tmp_path / "out")
    with run.opened():
        again = conduct_study(run, workers=Workers(2)).to_json()
    assert artefacts(tmp_path / "out").keys() == artefacts(out).keys()
    unlike = [name for name, data in artefacts(out).items() if artefacts(tmp_path / "out")[name] != data]
    assert set(unlike) <= {"study.json", "study-steps.json", *(n for n in unlike if "--seconds--" in n)}
    assert [row["name"] for row in again["arms"]] == [row["name"] for row in document["arms"]]
    trained = [stage for stage in stages_in(tmp_path / "out") if stage.startswith("students/")]
    assert len(trained) == 2 * 8  # each once here, and once in the run that was copied
    assert not (tmp_path / "out" / ".workers").exists()


def test_a_run_directory_in_which_a_worker_is_still_at_work_is_refused(finished, tmp_path):
    shutil.copytree(finished[1], tmp_path / "out")
    folder = RunDirectory(tmp_path / "out")
    with (
        folder.joined("kv--seed-0"),
        pytest.raises(InputError, match="a worker of an earlier command is still at work on kv--seed-0"),
        RunDirectory(tmp_path / "out").locked(),
    ):
        raise AssertionError("it was opened")
    with RunDirectory(tmp_path / "out").locked():
        assert not list((tmp_path / "out" / ".workers").iterdir())


def test_workers_within_a_launch_of_several_processes_are_refused(kvopt, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = kvopt("study", write_study(tmp_path / "job"), "--jobs", "2")
    assert code == 2
    assert "(--jobs, --ray) runs in one process" in err.splitlines()[-1]


def test_stages_that_processes_of_one_command_begin_are_all_in_the_manifest(tmp_path):
    first, second = RunDirectory(tmp_path), RunDirectory(tmp_path)
    (tmp_path / ".lock").touch()
    first.describe(RunManifest())
    with first.joined("a"), second.joined("b"):
        first.begin("students/a", "key-a")
        second.begin("students/b", "key-b")
        with first.ledger("students/a"):
            pass
    third = RunDirectory(tmp_path)
    third.read_manifest()
    assert third.manifest.stages == {"students/a": "key-a", "students/b": "key-b"}
