"""The run directory: what a run leaves, what a second run does again, and what follows a changed config."""

import json
import shutil

import pytest
import yaml
from safetensors.torch import load_file

from kvopt.config.document import Config, load_config
from kvopt.errors import InputError
from kvopt.measure.score import score_prefix, score_tokens
from kvopt.mutate.mutation import read_mutations
from kvopt.run.run import Run
from tests.jobs import artefacts, entries, run_job, stages_in, write_job, write_rows

SCORED = ("kv-8", "kv-best", "soft-6", "original", "none")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A config and its finished run; do not change them, copy them."""
    place = tmp_path_factory.mktemp("finished")
    config = write_job(place)
    board = run_job(config, place / "out")
    return config, place / "out", board


@pytest.fixture
def copied(finished, tmp_path):
    """A finished run to change: its config's path and a copy of its directory with an empty ledger."""
    out = tmp_path / "out"
    shutil.copytree(finished[1], out)
    (out / "ledger.jsonl").unlink()
    return finished[0], out


def changed(config, folder, change):
    """The same job with an edited config and its own copy of the data."""
    write_job(folder, change)
    return folder / config.name


def context(config, name):
    return next(c for c in config["contexts"] if c["name"] == name)


def test_a_run_leaves_every_artefact(finished):
    config, out, board = finished
    names = {path.name for path in out.iterdir()}
    assert names == {
        *(".lock", "config.yaml", "manifest.json", "ledger.jsonl", "reference", "mutations.jsonl", "scores.jsonl"),
        *("contexts", "scores", "leaderboard.json", "leaderboard.csv", "samples.json"),
    }
    assert Config.model_validate(yaml.safe_load((out / "config.yaml").read_text())) == load_config(config)[0]
    for name in ("kv-8", "kv-best", "soft-6"):
        files = {path.name for path in (out / "contexts" / name).iterdir()}
        assert files == {"adapter_config.json", "adapter_model.safetensors", "kvopt.json"}
    assert entries(out / "leaderboard.json") == board
    accepted = [m for m in read_mutations(out / "mutations.jsonl") if m.accepted]
    assert len(accepted) == 3
    names = [row["name"] for row in board["contexts"]]
    assert sorted(names) == sorted([*SCORED, *(m.name for m in accepted if m.name in names)])
    assert len(names) == 7
    assert len(board["other_mutations"]) == 1
    assert len((out / "leaderboard.csv").read_text().splitlines()) == 1 + 8


def test_scores_jsonl_has_every_context_on_its_splits(finished):
    _, out, _ = finished
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    splits = {(row["context"], row["split"]) for row in rows}
    assert {(name, "validation") for name in SCORED} <= splits
    assert {(f"m00{i}", "selection") for i in (1, 2, 3)} <= splits
    assert sum(split == "validation" and name.startswith("m0") for name, split in splits) == 2
    assert all(row["kl_forward"]["mean"] >= -1e-9 for row in rows)


def test_per_token_arrays_agree_with_the_reported_means(finished):
    _, out, board = finished
    for row in board["contexts"]:
        arrays = load_file(out / "scores" / f"{row['name']}.validation.b4.safetensors")
        assert arrays["kl"].double().mean().item() == pytest.approx(row["kl_forward"]["mean"])
        assert arrays["nll"].double().mean().item() == pytest.approx(row["gold_nll"])
        assert arrays["agree"].double().mean().item() == pytest.approx(row["top1_agreement"])
        assert arrays["counts"].sum().item() == row["gold_tokens"] == len(arrays["kl"])
        assert len(arrays["counts"]) == row["examples"]


def test_the_ledger_has_tokens_seconds_and_memory_of_every_stage(finished):
    _, out, _ = finished
    entries = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    assert [e["stage"] for e in entries if not e["stage"].startswith("scores/")] == [
        "reference", "mutations", "reference", "contexts/soft-6", "contexts/kv-best", "contexts/kv-8", "samples",
    ]  # fmt: skip
    for entry in entries:
        assert entry["outcome"] == "done"
        assert entry["seconds"] >= 0
        assert entry["peak_memory_bytes"] > 2**20
        # rules ask no model, and the original's scores are in the reference
        assert entry.get("tokens_in", 0) > 0 or entry["stage"] in ("mutations", "scores/original.validation")


def test_the_manifest_names_all_that_the_run_stands_on(finished):
    _, out, _ = finished
    manifest = json.loads((out / "manifest.json").read_text())
    assert list(manifest["stages"]) == [
        "contexts/kv-8",
        "contexts/kv-best",
        "contexts/soft-6",
        "mutations",
        "reference",
        "samples",
    ]
    assert manifest["base"]["weights"]
    assert manifest["seed"] == 0
    assert {"template_sha256", "data_sha256", "tokens_sha256", "versions", "device", "dtype"} <= set(manifest)


def test_a_second_run_does_nothing_again_and_leaves_the_same_bytes(finished, copied):
    config, out = copied
    made = [path for path in out.rglob("*") if path.parent != out and path.is_file()]
    assert len(made) > 20
    times = {path: path.stat().st_mtime_ns for path in made}
    board = run_job(config, out)
    assert board == finished[2]
    assert not (out / "ledger.jsonl").exists()
    assert artefacts(out) == artefacts(finished[1])
    assert {path: path.stat().st_mtime_ns for path in made} == times


def test_two_runs_of_one_config_give_the_same_bytes(finished, tmp_path):
    run_job(finished[0], tmp_path / "other")
    assert artefacts(tmp_path / "other") == artefacts(finished[1])


def test_other_steps_learn_that_context_again_and_nothing_else(copied, tmp_path):
    config, out = copied
    longer = changed(config, tmp_path / "job", lambda c: context(c, "kv-8").update(steps=8))
    before = artefacts(out)
    run_job(longer, out)
    assert stages_in(out) == ["contexts/kv-8", "scores/kv-8.selection", "scores/kv-8.validation", "samples"]
    after = artefacts(out)
    assert after["contexts/kv-8/adapter_model.safetensors"] != before["contexts/kv-8/adapter_model.safetensors"]
    assert after["contexts/kv-best/kvopt.json"] == before["contexts/kv-best/kvopt.json"]
    run_job(longer, tmp_path / "fresh")
    assert artefacts(tmp_path / "fresh") == after


def test_other_data_run_everything_again(copied, tmp_path):
    config, out = copied
    shutil.copy(out / "scores" / "none.validation.b4.safetensors", out / "scores" / "of-old-data.b4.safetensors")
    other = changed(config, tmp_path / "job", lambda c: None)
    write_rows(tmp_path / "job" / "train.jsonl", [{"text": f"Play song {i}.", "output": "music"} for i in range(12)])
    run_job(other, out)
    run_job(other, tmp_path / "fresh")
    assert stages_in(out) == stages_in(tmp_path / "fresh")
    assert artefacts(out) == artefacts(tmp_path / "fresh")


def test_an_added_context_is_the_only_one_learned(copied, tmp_path):
    config, out = copied
    new = {"name": "kv-4", "tokens": 4, "steps": 2, "batch_size": 4, "init": "context:kv-4-start"}
    start = new | {"name": "kv-4-start", "init": "template"}
    more = changed(config, tmp_path / "job", lambda c: c["contexts"].extend([start, new]))
    run_job(more, out)
    assert stages_in(out) == [
        "contexts/kv-4-start", "scores/kv-4-start.selection", "scores/kv-4-start.validation",
        "contexts/kv-4", "scores/kv-4.selection", "scores/kv-4.validation",
        "samples",
    ]  # fmt: skip


def test_a_context_that_starts_from_another_follows_its_changes(copied, tmp_path):
    config, out = copied
    heir = {"name": "heir", "steps": 1, "batch_size": 4, "init": "context:kv-8"}
    run_job(changed(config, tmp_path / "one", lambda c: c["contexts"].append(heir)), out)
    (out / "ledger.jsonl").unlink()
    both = changed(
        config, tmp_path / "two", lambda c: (c["contexts"].append(heir), context(c, "kv-8").update(learning_rate=0.01))
    )
    run_job(both, out)
    assert stages_in(out)[:4] == ["contexts/kv-8", "scores/kv-8.selection", "scores/kv-8.validation", "contexts/heir"]


def test_what_the_config_no_longer_has_leaves_its_place(copied, tmp_path):
    config, out = copied

    def fewer(c):
        c["mutations"] = {"count": 0}
        c["contexts"] = [context(c, "kv-8")]

    less = changed(config, tmp_path / "job", fewer)
    run_job(less, out)
    assert stages_in(out) == ["samples"]
    assert [p.name for p in (out / "contexts").iterdir()] == ["kv-8"]
    assert not (out / "mutations.jsonl").exists()
    assert set(json.loads((out / "manifest.json").read_text())["stages"]) == {"contexts/kv-8", "reference", "samples"}


def test_more_mutations_go_on_from_those_that_are_there(copied, tmp_path):
    config, out = copied
    before = (out / "mutations.jsonl").read_bytes()
    run_job(changed(config, tmp_path / "job", lambda c: c["mutations"].update(count=5)), out)
    assert (out / "mutations.jsonl").read_bytes().startswith(before)
    assert "scores/m001.selection" not in stages_in(out)
    assert "scores/m005.selection" in stages_in(out)


@pytest.mark.parametrize("damage", ["truncate", "delete"])
@pytest.mark.parametrize("name", ["reference/hidden-00000.safetensors", "scores/kv-8.validation.b4.safetensors"])
def test_a_damaged_or_lost_artefact_is_made_again(finished, copied, name, damage):
    config, out = copied
    if damage == "delete":
        (out / name).unlink()
    else:
        (out / name).write_bytes((out / name).read_bytes()[:100])
    run_job(config, out)
    assert artefacts(out) == artefacts(finished[1])


def test_with_scope_all_learned_contexts_are_scored_before_the_slots_alone(tmp_path):
    def whole(c):
        c["template"]["scope"] = "all"
        c["template"]["messages"][1]["content"] = "Message: {{text}}\nNow write its label, and nothing else."
        c["contexts"] = c["contexts"][:1]

    config, base_dir = load_config(write_job(tmp_path, whole))
    with Run(config, base_dir, tmp_path / "out", say=lambda line: None, bars=False).opened() as run:
        longer, bare = run.task().rows("validation").rows, run.task().bare_rows("validation").rows
        (kv,) = run.learned()
        board = {row["name"]: row["kl_forward"]["mean"] for row in run.run().to_json()["contexts"]}
        base, reference = run.load_base(), run.reference()
        before_slots, before_text = (
            score_prefix(base, kv.prefix(base), rows, reference).kl.mean().item() for rows in (bare, longer)
        )
        none = score_tokens(base, run.task().none, run.task().bare_rows("validation"), reference).kl.mean().item()
    assert all(len(b.body) < len(a.body) for a, b in zip(longer, bare, strict=True))
    assert [b.gold for b in bare] == [a.gold for a in longer]
    assert board["kv-8"] == pytest.approx(before_slots, rel=1e-4)
    assert before_text != pytest.approx(before_slots, rel=0.01)
    assert board["none"] == pytest.approx(none, rel=1e-4)
    assert board["original"] == pytest.approx(0, abs=1e-6)


def test_a_fault_leaves_the_finished_run_as_it_was(copied, finished, tmp_path):
    config, out = copied
    wrong = changed(config, tmp_path / "job", lambda c: context(c, "kv-8").update(tokens=500))
    with pytest.raises(InputError, match=r"contexts\.kv-8\.tokens: 500 slots"):
        run_job(wrong, out)
    assert artefacts(out) == artefacts(finished[1])


def test_a_folder_with_other_things_is_refused_untouched(finished, tmp_path):
    (tmp_path / "contexts" / "mine").mkdir(parents=True)
    (tmp_path / ".notes.partial").write_text("mine")
    with pytest.raises(InputError, match="not a run directory"):
        run_job(finished[0], tmp_path)
    assert (tmp_path / "contexts" / "mine").is_dir()
    assert (tmp_path / ".notes.partial").read_text() == "mine"


def test_half_a_line_in_the_ledger_is_cut_off(copied):
    config, out = copied
    (out / "ledger.jsonl").write_text('{"stage":"reference"}\n{"sta')
    run_job(config, out)
    assert (out / "ledger.jsonl").read_text() == '{"stage":"reference"}\n'


def test_another_process_is_kept_out(copied):
    config, out = copied
    loaded, base_dir = load_config(config)
    run = Run(loaded, base_dir, out, say=lambda line: None, bars=False)
    with run.opened(), pytest.raises(InputError, match="another kvopt is working"):
        run_job(config, out)


@pytest.mark.parametrize("rows", [0.1, [[1]], ["x"], {"a": 1}])
def test_a_damaged_index_of_the_reference_is_made_again(finished, copied, rows):
    config, out = copied
    index = out / "reference" / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"rows": rows}))
    run_job(config, out)
    assert artefacts(out) == artefacts(finished[1])
