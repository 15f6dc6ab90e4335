"""``model.shard: fsdp2``: decoder layers shared out over two processes give what one process with a whole base gives.

Each launch is two gloo processes on a CPU, whose exchanges are those of GPUs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kvopt.base.generate import generate
from kvopt.base.launch import LAUNCH, split
from kvopt.base.loading import Base, load_base
from kvopt.base.prefix import Prefix, gold_hidden, prefill
from kvopt.config.model import ModelConfig
from kvopt.errors import InputError
from kvopt.task.seam import Row, make_batch
from kvopt.train.student import twin
from tests.test_launch import ENVIRONMENT, LEARNED, alone, contents, errors, launched, write
from tests.tiny import save_tiny

LENGTHS = [(3, 2), (9, 4), (6, 1), (12, 3), (4, 2)]
ROWS = [Row(str(n), tuple(range(20, 20 + n)), tuple(range(50, 50 + m))) for n, m in LENGTHS]
MODELS = {"llama": {}, "checkpointed": {"gradient_checkpointing": True}, "gemma3": {"attention": "packed"}}


# ---- a whole run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The run directory of one process, and of two that share the base out."""
    folder = tmp_path_factory.mktemp("runs")
    job = write(folder / "job")
    alone(job, folder / "one")
    done = launched("run", job, "--out", folder / "two", "--set", "model.shard=fsdp2")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "one", folder / "two"


def test_what_is_measured_on_texts_is_that_of_a_whole_base_to_the_byte(runs: tuple[Path, Path]) -> None:
    ours, theirs = map(contents, runs)
    assert ours.keys() == theirs.keys()
    same = [name for name in ours if name.startswith(("reference/", "mutations")) or "m001" in name or "none" in name]
    assert any(name.startswith("answers/") for name in same)
    assert len(same) >= 6
    assert [name for name in same if ours[name] != theirs[name]] == []


def test_learned_contexts_and_scores_are_those_of_a_whole_base(runs: tuple[Path, Path]) -> None:
    for name in LEARNED:
        path = Path("contexts") / name / "adapter_model.safetensors"
        ours, theirs = (load_file(folder / path)["prompt_embeddings"] for folder in runs)
        assert (ours - theirs).abs().max() < 1e-5
    boards = [json.loads((folder / "leaderboard.json").read_text())["contexts"] for folder in runs]
    assert {row["name"] for row in boards[0]} >= set(LEARNED)
    for ours, theirs in zip(*boards, strict=True):
        assert ours["name"] == theirs["name"]
        assert ours["kl_forward"]["mean"] == pytest.approx(theirs["kl_forward"]["mean"], rel=1e-6, abs=1e-9)


# ---- a base alone: the same work, which :func:`worked` does in a launch and here


def answers(base: Base, places: list[int], prefix: Prefix) -> list[tuple[int, ...]]:
    """Of rows of one process: its answers are longer than those of another."""
    bodies = [ROWS[place].body for place in places]
    return list(generate(base, prefix, bodies, max_new_tokens=2 + 5 * places[0], stop=frozenset()))


def failing(base: Base, places: list[int], prefix: Prefix) -> None:
    if places == [1]:
        raise InputError("nothing can be done with row 1")
    answers(base, places, prefix)


@torch.no_grad()
def hidden(base: Base, places: list[int], prefix: Prefix) -> Tensor:
    return gold_hidden(base, prefix, make_batch(ROWS, places))


def gradient(base: Base, rows: list[int], slots: Tensor, soft: Tensor) -> list[Tensor]:
    """By the slots of a prefix, and by the embeddings that one is computed from: a way back through two passes."""
    slots, soft = (t.clone().requires_grad_() for t in (slots, soft))
    whole = Prefix.unstack(slots, base.dtype)
    (gold_hidden(base, whole, make_batch(ROWS, rows)) ** 2).sum().backward()
    (gold_hidden(base, prefill(base, embeddings=soft), make_batch(ROWS, rows)) ** 2).sum().backward()
    assert slots.grad is not None
    assert soft.grad is not None
    return [slots.grad, soft.grad]


def worked(base: Base) -> dict[str, Any]:
    """Everything in the first process; what can be divided is divided."""
    with torch.no_grad():
        prefix = prefill(base, ids=torch.arange(30, 37))
    generator = torch.Generator().manual_seed(0)
    soft = torch.randn(4, base.geometry.hidden_size, generator=generator)
    slots = prefix.stack()
    states = split(base, hidden, [[0, 1], [2], [3, 4]], prefix, progress=None)  # of two processes one has a batch more
    texts = split(base, answers, [[0], [1], [2]], prefix, progress=None)
    by_first = gradient(base, [0, 1, 2], slots, soft)
    both = LAUNCH.together(gradient, base, [3, 4], slots, soft) if LAUNCH.count > 1 else [by_first]
    return {"states": states, "answers": texts, "first": by_first, "both": both}


def in_launch(out: str, folder: str, settings: str) -> None:
    """What each process of a launch does here: the work, and then one order that fails in one process."""
    config = ModelConfig(base=folder, dtype="float32", device="cpu", shard="fsdp2", **json.loads(settings))
    LAUNCH.start("cpu", shares=True)
    if not LAUNCH.is_first:
        made: list[Base] = []

        def base() -> Base:
            made or made.append(load_base(config))
            return made[0]

        LAUNCH.serve({"base": base, "shards": lambda: base().shards})
    mine = load_base(config)
    LAUNCH.owns(base=mine)
    found = worked(mine)
    assert mine.shards is not None
    layer = mine.backbone.layers[0]
    mine.shards.need(0)
    whole, sizes = layer.mlp.up_proj.weight, sum(p.numel() for p in layer.parameters())
    mine.shards.need(1)
    found["kept"] = sum(p.to_local().numel() for p in layer.parameters()) / sizes
    found["freed"] = whole.untyped_storage().size() == 0
    try:
        split(mine, failing, [[0], [1], [2]], prefill(mine, ids=torch.arange(30, 37)), progress=None)
    except InputError as error:
        found["failed"] = str(error)
    found["after"] = split(mine, hidden, [[4]], prefill(mine, ids=torch.arange(30, 37)), progress=None)
    with pytest.raises(InputError, match="another base of this run is sharded already"):
        load_base(config)
    with pytest.raises(InputError, match="a student needs the whole base"):
        twin(mine)
    torch.save(found, out)
    LAUNCH.end(0)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_passes_answers_and_gradients_are_those_of_a_whole_base(name: str, tmp_path: Path) -> None:
    settings, kind = MODELS[name], name if name in ("llama", "gemma3") else "llama"
    folder = save_tiny(tmp_path / "base", kind, "gemma" if kind == "gemma3" else "chatml")
    script = tmp_path / "script.py"
    root = Path(__file__).parents[1]
    script.write_text("import sys; from tests.test_sharding import in_launch; in_launch(*sys.argv[1:])")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, script, tmp_path / "found", folder, json.dumps(settings)],
        env=ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(root), *sys.path])},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "found", weights_only=False)
    whole = load_base(ModelConfig(base=str(folder), dtype="float32", device="cpu", **settings))
    expected = worked(whole)
    assert all(torch.equal(*pair) for pair in zip(found["states"], expected["states"], strict=True))
    assert found["answers"] == expected["answers"]
    assert [len(texts[0]) for texts in found["answers"]] == [2, 7, 12]
    assert all(torch.equal(*pair) for pair in zip(found["first"], expected["first"], strict=True))
    with torch.no_grad():
        slots = prefill(whole, ids=torch.arange(30, 37)).stack()
    soft = torch.randn(4, whole.geometry.hidden_size, generator=torch.Generator().manual_seed(0))
    for gradients in found["both"]:
        both = gradient(whole, [3, 4], slots, soft)
        assert all(torch.equal(*pair) for pair in zip(gradients, both, strict=True))
    assert len(found["both"]) == 2
    assert (found["kept"], found["freed"]) == (0.5, True)
    assert found["failed"] == "nothing can be done with row 1"
    assert len(found["after"]) == 1


# ---- refused by one line


def test_one_process_alone_is_one_line(kvopt: Any, tmp_path: Path) -> None:
    job = write(tmp_path / "job")
    code, _, err = kvopt("optimize", job, "--out", tmp_path / "out", "--set", "model.shard=fsdp2")
    assert code == 2
    assert errors(err) == [
        "error: model.shard fsdp2: shares the base out over the processes of a launch, and this is one process alone"
        " (start a command that runs in several with accelerate launch or torchrun, or set model.shard: null)"
    ]


def test_students_and_quantization_are_one_line(kvopt: Any, tmp_path: Path) -> None:
    student = {"name": "s", "contexts": ["original"], "steps": 6, "batch_size": 4, "report_to": []}
    job = write(tmp_path / "job", students=[student])
    code, _, err = kvopt("train", job, "--out", tmp_path / "out", "--set", "model.shard=fsdp2")
    assert code == 2
    assert errors(err) == [
        "error: students.s: students cannot be trained from a sharded base"
        " (train them with a base that fits one device, without model.shard)"
    ]
    code, _, err = kvopt("validate", job, "--set", "model.shard=fsdp2", "--set", "model.quantization=nf4")
    assert code == 2
    assert "shard and quantization do not go together: set one of them" in errors(err)[0]
