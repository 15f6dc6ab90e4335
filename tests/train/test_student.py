"""Students as bases: sharing, saving, loading, refusing."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from kvopt.base.generate import generate
from kvopt.base.loading import Base
from kvopt.base.prefix import gold_hidden
from kvopt.contexts import KVContext
from kvopt.documents.student_record import StudentFacts
from kvopt.errors import InputError, KvoptError
from kvopt.task.seam import make_batch
from kvopt.train.student import Student, full_student, load_student, lora_student, save_student, twin
from tests.tasks import make_task
from tests.tiny import tiny_base, tiny_folder

IDS = torch.arange(5, 15)[None]


def logits(base: Base) -> Tensor:
    with torch.no_grad():
        return base.model.eval()(input_ids=IDS).logits


def moved(student: Student) -> Student:
    """With random values in everything that is trained."""
    for parameter in student.trainable().values():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return student


def test_a_twin_shares_every_parameter_and_no_module(base: Base) -> None:
    copied = twin(base)
    ours, theirs = dict(base.model.named_parameters()), dict(copied.model.named_parameters())
    assert all(ours[name] is theirs[name] for name in ours)
    assert not set(map(id, base.model.modules())) & set(map(id, copied.model.modules()))


def test_lora_starts_as_the_base_and_leaves_the_base_alone(base: Base) -> None:
    before = logits(base)
    student = lora_student(base, "s")
    assert torch.equal(logits(student.base), before)
    moved(student)
    assert not torch.allclose(logits(student.base), before)
    assert torch.equal(logits(base), before)
    assert not any("lora" in name for name, _ in base.model.named_modules())
    assert not any(p.requires_grad for p in base.model.parameters())


def test_head_and_backbone_of_a_lora_student_give_its_logits(base: Base) -> None:
    student = moved(lora_student(base, "s")).base
    with torch.no_grad():
        hidden = student.backbone(input_ids=IDS, use_cache=False).last_hidden_state[0]
        assert torch.allclose(student.head.logits(hidden), logits(student)[0], atol=1e-5)
    assert student.head.weight is base.model.get_output_embeddings().weight


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_saved_student_is_loaded_as_it_was(base: Base, method: str, tmp_path: Path) -> None:
    student = moved(lora_student(base, "s") if method == "lora" else full_student(base, "s"))
    save_student(student, tmp_path / "s", base, StudentFacts(key="k"))
    loaded = load_student(tmp_path / "s", base)
    assert torch.equal(logits(loaded), logits(student.base))
    assert (loaded.name, loaded.tokenizer, loaded.dtype) == ("s", base.tokenizer, base.dtype)
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.identity["weights"] == base.identity["weights"]
    assert loaded.identity != base.identity
    assert json.loads((tmp_path / "s" / "kvopt-student.json").read_text())["key"] == "k"


def test_a_lora_folder_is_a_plain_peft_adapter(tmp_path: Path) -> None:
    base = tiny_base("llama")
    student = moved(lora_student(base, "s"))
    save_student(student, tmp_path / "s", base)
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"), dtype=torch.float32)
    peft = PeftModel.from_pretrained(plain, tmp_path / "s")
    with torch.no_grad():
        assert torch.equal(peft(input_ids=IDS).logits, logits(student.base))


def test_a_full_folder_is_a_plain_transformers_model(tmp_path: Path) -> None:
    base = tiny_base("llama")
    student = moved(full_student(base, "s"))
    save_student(student, tmp_path / "s", base)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "s", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(plain(input_ids=IDS).logits, logits(student.base))
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight


def test_a_student_runs_bodies_behind_contexts_and_answers(tmp_path: Path) -> None:
    task = make_task(tiny_base("llama"), tmp_path / "reference")
    save_student(moved(lora_student(task.base, "s")), tmp_path / "s", task.base)
    student = load_student(tmp_path / "s", task.base)
    g = task.base.geometry
    kv = KVContext("kv", torch.randn(4, g.layers, 2, g.kv_heads, g.head_dim))
    batch = make_batch(task.encoded.rows, range(3))
    for context in (task.original, kv):
        hidden = gold_hidden(student, context.prefix(student), batch)
        assert hidden.shape == (len(batch.gold), g.hidden_size)
        assert not torch.allclose(hidden, gold_hidden(task.base, context.prefix(task.base), batch))
    bodies = [row.body for row in task.encoded.rows[:2]]
    assert len(generate(student, kv.prefix(student), bodies, max_new_tokens=3)) == 2


def test_full_masters_are_float32_and_tied_weights_stay_tied(base: Base) -> None:
    low = replace(base, model=copy.deepcopy(base.model).to(torch.bfloat16), dtype=torch.bfloat16)
    student = full_student(low, "s")
    assert {p.dtype for p in student.trainable().values()} == {torch.float32}
    model = student.base.model
    tied = base.model.get_output_embeddings().weight is base.model.get_input_embeddings().weight
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


def test_the_initial_adapter_is_a_function_of_the_seed_and_leaves_the_global_stream_alone(llama: Base) -> None:
    state = torch.random.get_rng_state()
    first, again, other = (lora_student(llama, "s", seed=seed).trainable() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_saving_twice_gives_the_same_bytes(llama: Base, tmp_path: Path) -> None:
    student = moved(lora_student(llama, "s"))
    for folder in ("a", "b"):
        save_student(student, tmp_path / folder, llama, StudentFacts(key="k"))
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("targets", ["nothing_here", ["lm_head"], ["embed_tokens"]])
def test_unknown_modules_and_the_head_are_refused_as_targets(llama: Base, targets: str | list[str]) -> None:
    with pytest.raises(InputError, match=r"lora\.targets"):
        lora_student(llama, "s", targets=targets)


def test_values_that_are_not_finite_are_not_written(llama: Base, tmp_path: Path) -> None:
    student = lora_student(llama, "s")
    next(iter(student.trainable().values())).data[0, 0] = torch.nan
    with pytest.raises(KvoptError, match="not finite"):
        save_student(student, tmp_path / "s", llama)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def folder(llama: Base, tmp_path: Path) -> Path:
    save_student(lora_student(llama, "s"), tmp_path / "s", llama)
    return tmp_path / "s"


def refused(folder: Path, base: Base, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        load_student(folder, base)
    assert "\n" not in str(caught.value)


def test_another_base_is_refused(folder: Path) -> None:
    refused(folder, tiny_base("qwen3"), "trained from base")


def test_a_changed_byte_is_refused(folder: Path, llama: Base) -> None:
    path = folder / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    refused(folder, llama, "not those that kvopt-student.json describes")


@pytest.mark.parametrize(
    ("name", "value"),
    [("lora_alpha", 33), ("r", 0.5), ("target_modules", 0.1), ("rank_pattern", "x"), ("use_rslora", True)],
)
@pytest.mark.parametrize("recorded", [True, False])
def test_a_changed_adapter_config_is_refused_and_never_a_traceback(
    folder: Path, llama: Base, name: str, value: object, recorded: bool
) -> None:
    """The weights alone do not say what the adapter does; of a foreign adapter, only what cannot be is known."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    if not recorded:
        (folder / "kvopt-student.json").unlink()
        if name in ("lora_alpha", "use_rslora"):
            load_student(folder, llama)
            return
    with pytest.raises(InputError, match="is not the one that" if recorded else "does not fit|of another shape"):
        load_student(folder, llama)


def test_a_cut_adapter_of_someone_else_is_refused(folder: Path, llama: Base) -> None:
    (folder / "kvopt-student.json").unlink()
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, llama, "damaged or truncated")


def test_an_adapter_for_another_shape_is_refused(folder: Path) -> None:
    (folder / "kvopt-student.json").unlink()
    refused(folder, tiny_base("qwen3"), "missing, foreign or of another shape")


def test_missing_weights_a_newer_format_and_other_folders_are_refused(
    folder: Path, llama: Base, tmp_path: Path
) -> None:
    refused(tmp_path / "nothing", llama, "is not a student folder")
    record = json.loads((folder / "kvopt-student.json").read_text())
    (folder / "kvopt-student.json").write_text(json.dumps(record | {"format_version": 99}))
    refused(folder, llama, "format version 99")
    (folder / "kvopt-student.json").write_text("{")
    refused(folder, llama, "cannot be read as JSON")
    (folder / "kvopt-student.json").write_text(json.dumps(record))
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, llama, "has no weights")
