"""Memory that runs out is one line with the stage, the peak and the setting that halves it, and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from kvopt.base.devices import is_out_of_memory
from kvopt.config.document import Config, load_config
from kvopt.documents.ledger import read_ledger
from kvopt.errors import KvoptError
from kvopt.learning import descent
from kvopt.run.directory import RunDirectory
from kvopt.run.out_of_memory import halving, out_of_memory
from tests.jobs import run_job, write_job

Kvopt = Callable[..., tuple[int, str, str]]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(write_job(tmp_path))[0]


@pytest.mark.parametrize(
    ("stage", "mend"),
    [
        ("contexts/kv-8", "contexts.kv-8.micro_batch_size=2"),
        ("reference", "reference.batch_size=2"),
        ("reference/moments", "reference.storage=hidden"),
        ("scores/kv-8.validation", "score.batch_size=2"),
        ("answers/none.validation", "evaluate.batch_size=8"),
        ("mutations", "model.quantization=nf4"),
    ],
)
def test_every_stage_has_a_setting(config: Config, stage: str, mend: str) -> None:
    assert halving(config, stage) == mend


def test_what_is_halved_already_is_halved_again_until_there_is_one_row(tmp_path: Path) -> None:
    path = write_job(tmp_path)

    def after(*settings: str) -> str:
        return halving(load_config(path, settings)[0], "contexts/kv-8")

    assert after("contexts.kv-8.micro_batch_size=2") == "contexts.kv-8.micro_batch_size=1"
    one = "contexts.kv-8.micro_batch_size=1"
    assert after(one) == "model.gradient_checkpointing=true"
    assert after(one, "model.gradient_checkpointing=true") == "model.quantization=nf4"
    assert after(one, "model.gradient_checkpointing=true", "model.quantization=int8") == ""


def test_a_students_micro_batches_are_halved_by_accumulation(tmp_path: Path) -> None:
    path = write_job(tmp_path)
    student = "students=[{name: s, contexts: [original], batch_size: 8, accumulation: 2}]"
    assert halving(load_config(path, [student])[0], "students/s") == "students.s.accumulation=4"


def test_a_run_out_of_memory_is_one_line_and_goes_on_where_it_was(
    kvopt: Kvopt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_job(tmp_path, lambda config: config.update(contexts=config["contexts"][:1]))
    enough, calls = descent.linear_kl, [0]

    def linear_kl(*args: object, **options: object) -> object:
        calls[0] += 1
        if calls[0] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return enough(*args, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(descent, "linear_kl", linear_kl)
        code, _, err = kvopt("run", path, "--out", "run")
    [line] = [line for line in err.splitlines() if line.startswith("error:")]
    assert code == 1
    assert "Traceback" not in err
    assert "contexts/kv-8: out of memory, at a peak of" in line
    assert "GiB resident; what is finished is kept; set contexts.kv-8.micro_batch_size=2 and run" in line
    entry = read_ledger(tmp_path / "run" / "ledger.jsonl")[-1]
    assert (entry.stage, entry.outcome, entry.peak_memory_of) == ("contexts/kv-8", "failed", "resident")
    assert (tmp_path / "run" / ".state" / "kv-8.safetensors").is_file()
    assert kvopt("run", path, "--out", "run", "--set", "contexts.kv-8.micro_batch_size=2")[0] == 0
    entry = next(e for e in reversed(read_ledger(tmp_path / "run" / "ledger.jsonl")) if e.stage == "contexts/kv-8")
    assert (entry.outcome, entry.steps) == ("done", 6)
    run_job(path, tmp_path / "whole")
    of_both = [tmp_path / name / "contexts" / "kv-8" / "adapter_model.safetensors" for name in ("run", "whole")]
    ours, theirs = (load_file(file)["prompt_embeddings"] for file in of_both)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_other_errors_are_not_taken_for_it(tmp_path: Path) -> None:
    allocator = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError(allocator))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    directory = RunDirectory(tmp_path)
    with pytest.raises(RuntimeError, match="illegal"), directory.ledger("reference"):
        raise RuntimeError("an illegal memory access")
    with pytest.raises(KvoptError, match="reference: out of memory"), directory.ledger("reference"):
        raise RuntimeError(allocator)


def test_on_a_gpu_the_ledger_says_what_torch_allocated_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 1)
    module = SimpleNamespace(
        max_memory_allocated=lambda device: {1: 3 * 2**30}[device.index],
        get_device_properties=lambda device: SimpleNamespace(total_memory=80 * 2**30),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    directory = RunDirectory(tmp_path, device=gpu)
    with directory.ledger("scores/x"):
        pass
    [entry] = read_ledger(tmp_path / "ledger.jsonl")
    assert (entry.peak_memory_bytes, entry.peak_memory_of) == (3 * 2**30, "allocated on cuda:1")
    assert "a peak of 3.00 of 80.00 GiB allocated on cuda:1;" in str(out_of_memory("scores/x", gpu))
