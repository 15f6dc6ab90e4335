"""``kvopt plan``: tokens and FLOPs of every stage as a run has them, what does not fit, and what a user is told."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kvopt.base.hardware import DEVICES, Hardware
from kvopt.base.loading import load_empty
from kvopt.base.prefix import packing_for
from kvopt.base.workload import EXPERTS, Shape, Workload
from kvopt.config.document import load_config
from kvopt.config.model import ModelConfig
from kvopt.documents.ledger import LedgerEntry, read_ledger
from kvopt.errors import InputError
from kvopt.run import calibration, planning
from kvopt.run.directory import RunDirectory
from kvopt.run.forecast import Forecast
from kvopt.run.inputs import read_inputs
from kvopt.run.run import Run
from kvopt.task.seam import make_batch
from tests.attentions import BASES, base_of, saved
from tests.jobs import write_job
from tests.tiny import save_tiny, tiny_folder

Kvopt = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calibration takes a moment."""
    monkeypatch.setattr(planning, "CALIBRATION", 0.05)


def job(folder: Path, change: Callable[[dict[str, Any]], object] = lambda config: None, base: str = "llama") -> Path:
    """The tests' job without what a plan cannot count: mutations, answers."""

    def changed(config: dict[str, Any]) -> None:
        config["model"] |= {"base": str(tiny_folder(base)), "attn_implementation": "eager"}
        config["mutations"]["count"] = 0
        config["report"]["examples"] = 0
        config["contexts"] = [config["contexts"][0] | {"micro_batch_size": 3}, config["contexts"][2]]
        change(config)

    return write_job(folder, changed)


def small(memory: float) -> Hardware:
    """A device of so many bytes."""
    return Hardware("small", memory, 1e12, 1e12, 1.0, "made up")


def plan_of(config: Path, device: str = "here", count: int = 1) -> dict[str, Any]:
    return planning.make_plan(read_inputs(*load_config(config)), device, count)


@pytest.mark.parametrize(("base", "attention"), [("llama", "auto"), ("llama", "padded"), ("gemma3", "packed")])
def test_tokens_and_flops_of_every_stage_are_those_of_the_run(
    base: str, attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FLOPs as torch.utils.flop_counter counts them while the stage works; eager attention, which it sees on a CPU."""
    config = job(tmp_path / "job", lambda c: c["model"].update(attention=attention), base)
    flops: dict[str, int] = {}
    tokens: dict[str, int] = {}
    real = RunDirectory.ledger

    @contextlib.contextmanager
    def counted(self: RunDirectory, stage: str) -> Iterator[LedgerEntry]:
        with FlopCounterMode(display=False) as counter, real(self, stage) as entry:
            yield entry
        flops[stage] = flops.get(stage, 0) + counter.get_total_flops()

    monkeypatch.setattr(RunDirectory, "ledger", counted)
    run = Run(*load_config(config), tmp_path / "run", say=lambda line: None, bars=False)
    with run.opened():
        run.run()
    for entry in read_ledger(run.directory / "ledger.jsonl"):
        tokens[entry.stage] = tokens.get(entry.stage, 0) + entry.tokens_in
    stages = plan_of(config)["stages"]
    assert {stage["stage"]: stage["tokens_in"] for stage in stages} == tokens
    assert {stage["stage"]: stage["flops"] for stage in stages} == flops
    assert not any(stage["about"] for stage in stages)


@pytest.mark.parametrize("name", [name for name in BASES if name != "qwen3"])
@pytest.mark.parametrize("slots", [0, 11])
def test_a_batch_stands_as_the_run_has_it(name: str, slots: int, tmp_path: Path) -> None:
    """Under default settings, on a CPU."""
    folder = tiny_folder(name) if name in ("llama", "gemma3") else saved(name, tmp_path / "base")
    config = job(tmp_path / "job", lambda c: c["model"].update(base=str(folder), attn_implementation="auto"))
    task = Run(*load_config(config), tmp_path / "run", say=lambda line: None, bars=False).task()
    rows = task.rows("train").rows[:5]
    workload = Workload(load_empty(task.config.model, torch.float32)[0], copies=True)
    shape = Forecast(task, workload, "cpu").shape_of(rows, slots)
    batch = make_batch(rows, range(len(rows)))
    packing = packing_for(task.base, batch, slots)
    lines = (packing.lines, packing.width) if packing else tuple(batch.ids.shape)
    assert (shape.lines, shape.width, shape.prefix) == (*lines, slots)
    assert (shape.pairs is not None) == bool(packing and packing.apart) == (name == "llama" and slots > 0)
    if shape.pairs is not None:
        assert shape.pairs == sum(n * (slots + n) for n in batch.lengths)


@pytest.mark.parametrize("name", [name for name in BASES if name != "gpt-oss"])
@pytest.mark.parametrize("gradient", ["none", "prefix"])
def test_a_pass_is_counted_for_every_architecture(name: str, gradient: Any, tmp_path: Path) -> None:
    folder = tiny_folder(name) if name != "gemma2" else saved(name, tmp_path)
    workload = Workload(load_empty(ModelConfig(base=str(folder)), torch.float32)[0], copies=True)
    for shape in (Shape(3, 17, 9), Shape(1, 40, 5)):
        assert workload.flops(shape, gradient) == workload._flops_of(shape, gradient)
    weights = sum(p.numel() for p in base_of(name).model.parameters()) * 4
    assert weights <= workload.weight_bytes < 1.05 * weights


def test_experts_are_counted_by_those_that_a_token_meets(tmp_path: Path) -> None:
    model, _ = load_empty(ModelConfig(base=str(saved("gpt-oss", tmp_path))), torch.bfloat16)
    workload = Workload(model, copies=True)
    with FlopCounterMode(display=False) as counter:
        workload._run(Shape(2, 10, 4), "none")
    experts = 2 * 2 * (20 * 2) * (32 * 96 + 48 * 32)  # 2 layers, 2 of 4 experts for each of 20 tokens
    assert workload.flops(Shape(2, 10, 4)) == counter.get_total_flops() + experts
    assert list(EXPERTS) == [torch.ops.aten._grouped_mm]


def test_kept_activations_grow_with_rows_and_shrink_where_attention_copies_nothing() -> None:
    model, _ = load_empty(ModelConfig(base=str(tiny_folder("llama"))), torch.float32)
    few, many, flexible = (
        Workload(model, copies).saved_bytes(Shape(lines, 64, 32), "prefix")
        for lines, copies in ((2, True), (8, True), (8, False))
    )
    assert 3 * few < many < 5 * few
    assert flexible < many


def test_a_larger_device_is_planned_without_being_there(tmp_path: Path) -> None:
    config = job(tmp_path)
    one, two = plan_of(config, "h100-80gb"), plan_of(config, "h100-80gb", 2)
    assert one["fits"]
    assert one["changes"] == []
    assert one["dtype"] == "float32", "the config says so"
    assert one["seconds"] == pytest.approx(2 * two["seconds"])
    assert one["flops"] / (0.4 * 67e12) == pytest.approx(one["seconds"])
    assert "H100 data sheet" in one["source"]


def test_config_and_tokenizer_are_enough(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_folder("llama"), folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    config = job(tmp_path / "job")
    bare = job(tmp_path / "bare", lambda c: c["model"].update(base=str(folder)))
    assert plan_of(bare, "h100-80gb") == plan_of(config, "h100-80gb")


def test_what_does_not_fit_names_the_setting_that_mends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def long_steps(config: dict[str, Any]) -> None:
        config["contexts"] = [config["contexts"][0] | {"batch_size": 8, "micro_batch_size": None}]

    config = job(tmp_path, long_steps)
    whole = plan_of(config, "h100-80gb")
    step = next(s for s in whole["stages"] if s["stage"] == "contexts/kv-8")
    with_room = (step["peak_memory_bytes"] - 1) / planning.USABLE
    monkeypatch.setitem(DEVICES, "small", small(with_room))
    result = plan_of(config, "small")
    assert not result["fits"]
    assert result["changes"] == ["contexts.kv-8.micro_batch_size: 4"]
    smaller = plan_of(
        job(tmp_path / "again", lambda c: (long_steps(c), c["contexts"][0].update(micro_batch_size=4))), "small"
    )
    assert smaller["fits"], "what it says mends it"
    monkeypatch.setitem(DEVICES, "small", small(1000.0))
    [change] = plan_of(config, "small")["changes"]
    assert re.fullmatch(r"the weights alone take .* GiB a device: take a larger device", change)


def test_a_base_that_fits_no_device_is_shared_out_over_as_many_as_hold_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def many_layers(config: dict[str, Any], **settings: str) -> None:
        folder = save_tiny(tmp_path / "deep", "llama", "chatml", num_hidden_layers=24)
        config["model"].update(base=str(folder), **settings)

    config = job(tmp_path / "whole", many_layers)
    weights = plan_of(config, "h100-80gb")["weights_bytes"]
    monkeypatch.setitem(DEVICES, "small", small(0.6 * weights / planning.USABLE))
    [change] = plan_of(config, "small")["changes"]
    found = re.fullmatch(
        r"model\.shard: fsdp2 and (\d+) devices of this kind \(the weights, .* do not fit one device\)", change
    )
    assert found
    sharded = job(tmp_path / "sharded", partial(many_layers, shard="fsdp2"))
    held = [plan_of(sharded, "small", count)["peak_memory_bytes"] for count in (int(found[1]) - 1, int(found[1]))]
    work = plan_of(config, "h100-80gb")["peak_memory_bytes"] - weights
    assert held[0] - work > 0.6 * weights >= held[1] - work
    [change] = plan_of(config, "small", int(found[1]))["changes"]
    assert change.startswith("model.shard: fsdp2 (the weights, ")


def test_the_command_prints_a_table_or_one_document(kvopt: Kvopt, tmp_path: Path) -> None:
    config = job(tmp_path)
    code, out, err = kvopt("plan", config, "--device", "a100-80gb", "--json")
    assert code == 0, err
    document = json.loads(out)
    code, out, err = kvopt("plan", config, "--device", "a100-80gb")
    assert code == 0, err
    assert f"plan: {document['tokens_in']:,} tokens" in out
    assert "contexts/soft-6" in out
    assert "not counted: nothing" in out


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--device", "h100"], "--device: no such device: h100 (known: here, t4-16gb, "),
        (["--count", "0"], "--count: 0 devices can do nothing (give 1 or more)"),
        (["--count", "64"], "--count 64: this machine has 1 device of the kind cpu (name the device that you plan for"),
    ],
)
def test_wrong_options_are_one_line(options: list[str], line: str, kvopt: Kvopt, tmp_path: Path) -> None:
    code, out, err = kvopt("plan", job(tmp_path), *options)
    assert (code, out) == (2, "")
    assert line in err
    assert len(err.strip().splitlines()) == 1


def test_a_run_begins_with_three_lines_of_its_plan(kvopt: Kvopt, tmp_path: Path) -> None:
    code, _, err = kvopt("run", job(tmp_path), "--out", tmp_path / "run")
    assert code == 0, err
    lines = [line for line in err.splitlines() if line.startswith(("plan: ", "memory: ", "not counted: "))]
    assert len(lines) == 3
    assert "on here (cpu) in float32" in lines[0]


def test_what_cannot_be_counted_is_named_and_stops_no_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def more(config: dict[str, Any]) -> None:
        config["report"]["examples"] = 1
        config["contexts"][0]["init"] = "matched"
        config["students"] = [{"name": "one", "contexts": ["original"]}]

    assert plan_of(job(tmp_path, more), "h100-80gb")["not_counted"] == [
        "answers for the report's samples and for metrics",
        "the fit of starts (init: matched, salient)",
        "students: one",
    ]

    def fails(self: Workload, *args: Any) -> int:
        raise InputError("the work of this base cannot be counted: because", where="model.base")

    monkeypatch.setattr(Workload, "flops", fails)
    from kvopt.cli.plans import say_plan

    run = Run(*load_config(job(tmp_path / "again")), tmp_path / "run", say=lambda line: None, bars=False)
    said: list[str] = []
    monkeypatch.setattr("kvopt.cli.plans.say", said.append)
    with run.opened():
        say_plan(run)
    assert said == ["plan: none (model.base: the work of this base cannot be counted: because)"]


def test_rates_are_flops_over_measured_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_median_seconds", lambda work, device, budget: (work(), 0.5)[1])
    workload = Workload(load_empty(ModelConfig(base=str(tiny_folder("gemma3"))), torch.float32)[0], copies=True)
    rates = calibration.measured_rates(workload, Shape(2, 12, 6), torch.device("cpu"), 1.0)
    two = workload.flops(Shape(2, 12, 6)) / workload.layers * 2
    assert rates.forward == pytest.approx(two / 0.5, rel=0.1)
    assert rates.backward > 1.8 * rates.forward
    assert rates.head == 6 * 256 * workload.hidden_size * workload.vocab_size / 0.5
