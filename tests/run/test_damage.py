"""Damage to what a run stores: what can be made again is, with a line; a learned context is refused. Never another
number.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kvopt.config.document import load_config
from kvopt.errors import InputError
from kvopt.learning import descent_state
from kvopt.run.run import Run
from tests.jobs import artefacts, entries, run_job, stages_in, write_job

OTHER = "is damaged: its content is not what was written"
METRICS = {"rows": 3, "max_new_tokens": 4, "metrics": ["exact-match"]}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(config, run directory), with stored moments; copy the second."""
    place = tmp_path_factory.mktemp("damage")

    def change(config: dict[str, Any]) -> None:
        config["contexts"] = [config["contexts"][0] | {"steps": 3, "eval_every": 1}]
        config |= {"mutations": {"count": 0}, "evaluate": METRICS, "reference": {"storage": "moments", "batch_size": 4}}

    config = write_job(place / "job", change)
    run_job(config, place / "out")
    return config, place / "out"


@pytest.fixture
def out(finished: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished[1], tmp_path / "out"))


def damage_told(config: Path, out: Path) -> list[str]:
    """What the same command says of damage."""
    lines: list[str] = []
    loaded, base_dir = load_config(config)
    with Run(loaded, base_dir, out, say=lines.append, bars=False).opened() as run:
        run.run()
    return [line for line in lines if "damaged" in line]


def flip(path: Path, place: int = -3) -> Path:
    """Flip one bit of the file, of its last tensor where nothing else is said."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    return path


def one_digit(path: Path, name: str) -> Path:
    """Change the last digit of the first number under this name."""
    text = path.read_text("utf-8")
    at = text.index(f'"{name}"') + len(name) + 2
    at = next(i for i in range(at, len(text)) if text[i].isdecimal() and not text[i + 1].isdecimal())
    path.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :], "utf-8")
    return path


@pytest.mark.parametrize("name", ["none.validation", "kv-8.selection", "original.validation"])
def test_scores_with_a_flipped_bit_are_measured_again(finished: tuple[Path, Path], out: Path, name: str) -> None:
    path = flip(sorted((out / "scores").glob(f"{name}.b*.safetensors"))[0])
    before = len(stages_in(out))
    assert damage_told(finished[0], out) == [f"warning: {path}: {OTHER}; it is measured again"]
    assert f"scores/{name}" in stages_in(out)[before:]
    assert artefacts(out) == artefacts(finished[1])


@pytest.mark.parametrize("place", ["first row", "last row"])
def test_a_shard_with_a_flipped_bit_is_made_again_when_it_is_read(
    finished: tuple[Path, Path], out: Path, place: str
) -> None:
    path = out / "reference" / "hidden-00000.safetensors"
    data = path.read_bytes()
    flip(path, 8 + int.from_bytes(data[:8], "little") if place == "first row" else -1)
    assert damage_told(finished[0], out) == [], "nothing needed it"
    shutil.rmtree(out / "scores")
    assert damage_told(finished[0], out) == [f"warning: {path}: {OTHER}; it is made again"]
    assert path.read_bytes() == data
    assert artefacts(out) == artefacts(finished[1])


def test_every_other_file_of_the_reference_is_made_again_too(finished: tuple[Path, Path], out: Path) -> None:
    def learn_again() -> list[str]:
        shutil.rmtree(out / "contexts")
        shutil.rmtree(out / "scores")
        return damage_told(finished[0], out)

    index, moments = out / "reference" / "index.json", out / "reference" / "moments-00000.safetensors"
    one_digit(index, "rows")
    assert learn_again() == [f"warning: {index}: {OTHER}; the reference is made again"]
    flip(moments)
    assert learn_again() == [f"warning: {moments}: {OTHER}; it is made again"]
    shard = out / "reference" / "hidden-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    assert learn_again() == [f"warning: {shard}: is damaged; it is made again"]
    assert artefacts(out) == artefacts(finished[1])


def test_stored_answers_with_another_letter_are_asked_for_again(finished: tuple[Path, Path], out: Path) -> None:
    path = sorted((out / "answers").rglob("*.jsonl"))[0]
    one_digit(path, "example_id")
    assert damage_told(finished[0], out) == [f"warning: {path}: is damaged; it is made again"]
    assert artefacts(out) == artefacts(finished[1])


def test_a_descent_begins_anew_where_its_state_is_damaged(
    finished: tuple[Path, Path], out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = descent_state.DescentState.save

    def save(self: Any, path: Path, key: str) -> None:
        once(self, path, key)
        shutil.copy(path, tmp_path / "state")

    monkeypatch.setattr(descent_state.DescentState, "save", save)
    monkeypatch.setattr(descent_state, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    shutil.rmtree(out / "contexts")
    damage_told(finished[0], out)
    shutil.rmtree(out / "contexts")
    (out / ".state").mkdir(exist_ok=True)
    state = Path(shutil.move(tmp_path / "state", out / ".state" / "kv-8.safetensors"))
    flip(state)
    assert damage_told(finished[0], out) == [f"warning: {state}: {OTHER}; the descent begins anew"]
    assert artefacts(out) == artefacts(finished[1])


@pytest.mark.parametrize("name", ["tokens", "first", "body", "replaced_ids", "held_out_kl", "best_step"])
def test_a_context_whose_record_has_another_number_is_refused_and_kept(
    finished: tuple[Path, Path], out: Path, name: str
) -> None:
    path = one_digit(out / "contexts" / "kv-8" / "kvopt.json", name)
    with pytest.raises(InputError, match=rf"kvopt\.json: {OTHER}") as caught:
        damage_told(finished[0], out)
    assert "delete its last entry, the checksum, if you changed it yourself" in str(caught.value)
    assert (path.parent / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "number"),
    [("leaderboard.json", "kl_forward"), ("answers.json", "max_new_tokens"), ("manifest.json", "seed")],
)
def test_a_document_with_another_number_is_refused_by_what_shows_it(
    kvopt: Callable[..., tuple[int, str, str]], out: Path, name: str, number: str
) -> None:
    one_digit(out / name, number)
    code, _, err = kvopt("compare", out, "--out", out / "page.html")
    assert code == 2
    assert f"{name}: {OTHER}" in err
    assert len(err.strip().splitlines()) == 1


def test_what_older_versions_wrote_has_no_checksums_and_is_read(finished: tuple[Path, Path], out: Path) -> None:
    for path in out.rglob("*.json"):
        path.write_text(json.dumps(entries(path)), "utf-8")
    for path in (out / "answers").rglob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        path.write_text("".join(json.dumps(row | {"checksum": None}) + "\n" for row in rows), "utf-8")
        path.write_text(path.read_text("utf-8").replace(', "checksum": null', ""), "utf-8")
    for path in (*out.glob("reference/*.safetensors"), *out.glob("scores/*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            facts = file.metadata()
        assert facts.keys() == {"key", "sha256"}
        save_file(load_file(path), path, metadata={"key": facts["key"]})
    before = len(stages_in(out))
    assert damage_told(finished[0], out) == []
    assert stages_in(out)[before:] == [], "nothing is computed again"
