"""Stock trainers beside our data set and callbacks: the same loss on the original alone, and what the callbacks do."""

from __future__ import annotations

import ast
import copy
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from kvopt.errors import InputError
from kvopt.measure.reference import build_reference
from kvopt.task.seam import Encoder
from kvopt.task.template import Template
from kvopt.train import ContextClock, ContextCollator, ContextDataset, ForgettingProbe, StateAdaptive, WordingProbe
from kvopt.train.callbacks import gold_nll_of
from kvopt.train.evaluation.likelihood import likelihoods
from kvopt.train.gold import gold_nll
from tests.jobs import rows, run_job, write_job
from tests.tiny import tiny_base, tiny_folder, tiny_tokenizer
from tests.train.test_context_dataset import WORDINGS, made

ORIGINAL = {"original": WORDINGS["original"]}
ADAPTIVE = {"kind": "state-adaptive", "every": 2, "keep": 1, "rows": 4}


def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_folder("llama"), dtype=torch.float32)


def with_lora(one: Any) -> Any:
    torch.manual_seed(5)
    return get_peft_model(one, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    given = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 0.01, "logging_steps": 1, "seed": 3}
    given |= {"save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True} | settings
    return TrainingArguments(output_dir=str(folder), **given)


def trained(
    folder: Path, data: Any, callbacks: list[Any], one: Any = None, resume: bool = False, **args: Any
) -> Trainer:
    collator = args.pop("collator", None) or ContextCollator.of(tiny_tokenizer("chatml"))
    trainer = Trainer(one or model(), arguments(folder, **args), collator, data, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer: Trainer, name: str) -> list[tuple[int, Any]]:
    return [(entry["step"], entry[name]) for entry in trainer.state.log_history if name in entry]


class Met(TrainerCallback):
    """The contexts of what a data set gave, item by item."""

    def __init__(self, data: ContextDataset, monkeypatch: pytest.MonkeyPatch) -> None:
        self.items: list[tuple[int, int]] = []
        inner = data.item
        monkeypatch.setattr(data, "item", lambda row, c: (self.items.append((row, c)), inner(row, c))[1])


def test_on_the_original_alone_the_stock_trainer_s_loss_is_what_it_was(tmp_path: Path) -> None:
    data, plain = made(ORIGINAL), []
    encoder, template = Encoder(tiny_tokenizer("chatml")), Template.from_messages(ORIGINAL["original"])
    for row in rows(12):
        text = encoder.renderer.render(template, {"text": row["text"]}).text
        prompt = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
        gold = encoder.tokenizer(row["output"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        plain.append({"input_ids": prompt + gold, "labels": [-100] * len(prompt) + gold})
    stock = DataCollatorForSeq2Seq(tiny_tokenizer("chatml"), padding=True)
    theirs = trained(tmp_path / "a", plain, [], collator=stock)
    ours = trained(tmp_path / "b", data, [ContextClock(data)])
    assert dict(logged(ours, "loss")) == pytest.approx(dict(logged(theirs, "loss")), abs=1e-6)
    assert logged(ours, "loss")[0][1] > logged(ours, "loss")[-1][1]


def test_the_clock_gives_every_epoch_its_wordings_resumed_or_not(tmp_path: Path, monkeypatch: Any) -> None:
    def run(folder: Path, resume: bool, steps: int) -> list[tuple[int, int]]:
        data = made()
        met = Met(data, monkeypatch)
        settings = {"max_steps": steps, "save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "constant"}
        trained(folder, data, [ContextClock(data)], resume=resume, **settings)
        return met.items

    whole = run(tmp_path / "whole", False, 9)
    assert len(whole) == 36
    for epoch in range(3):
        assert sorted(row for row, _ in whole[12 * epoch : 12 * epoch + 12]) == list(range(12))
    contexts = [dict(whole[12 * e : 12 * e + 12]) for e in range(3)]
    assert contexts[0] != contexts[1] != contexts[2]
    run(tmp_path / "part", False, 4)
    assert run(tmp_path / "part", True, 9) == whole[16:]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_k_steps_all_rows_meet_another_wording(tmp_path: Path, monkeypatch: Any, accumulation: int) -> None:
    data = made(schedule={"kind": "resample", "every": 2}, count=14, seed=1)
    met = Met(data, monkeypatch)
    size = 4 // accumulation
    settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 8}
    trained(tmp_path, data, [ContextClock(data)], **settings)
    steps, items = [], [context for _, context in met.items]
    for start, epoch in ((0, items[:14]), (4, items[14:28])):  # the last step of an epoch has two rows
        for step in range(start, start + 4):
            now, epoch = epoch[:4], epoch[4:]
            assert set(now) == {data.stream.context(step, ())}, step
            steps.append(now[0])
    assert steps[0::2] == steps[1::2]
    assert len(set(steps)) > 1


def test_state_adaptive_switches_to_what_is_easiest_for_the_model_now(tmp_path: Path, monkeypatch: Any) -> None:
    data = made(schedule=ADAPTIVE)
    met = Met(data, monkeypatch)
    scored = []
    probe = StateAdaptive(data, batch_size=3)
    inner = probe.measured

    def measured(one: nn.Module) -> dict[str, Any]:
        before = len(met.items)
        values = inner(one)
        del met.items[before:]  # items of the scoring itself
        task = [gold_nll_of(one, [data.item(r, c) for r in range(4)], 4) for c in range(3)]
        del met.items[before:]
        assert [values[f"context_nll/{name}"] for name in data.names] == pytest.approx(task, abs=1e-5)
        assert not one.training
        scored.append((before, values["contexts_kept"], data.names[task.index(min(task))]))
        return values

    monkeypatch.setattr(probe, "measured", measured)
    trainer = trained(tmp_path, data, [probe], learning_rate=0.1)
    kept = logged(trainer, "contexts_kept")
    assert [step for step, _ in kept] == [0, 2, 4]
    assert [name for _, name, _ in scored] == [best for _, _, best in scored]
    assert len({name for _, name in kept}) > 1, "the model changes its mind"
    for (start, name, _), end in zip(scored, [s for s, *_ in scored[1:]] + [len(met.items)], strict=True):
        assert {data.names[context] for _, context in met.items[start:end]} == {name}
    # what was fetched when it switched: one micro-batch ahead
    assert [start for start, *_ in scored] == [0, 12, 20]
    assert trainer.model.training


def test_state_adaptive_takes_up_the_choice_of_a_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    settings = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant", "learning_rate": 0.1}
    data = made(schedule=ADAPTIVE)
    first = trained(tmp_path, data, [StateAdaptive(data)], max_steps=3, **settings)
    (_, before) = logged(first, "contexts_kept")[-1]
    again = made(schedule=ADAPTIVE)
    met = Met(again, monkeypatch)
    trained(tmp_path, again, [StateAdaptive(again)], resume=True, max_steps=4, **settings)
    assert {again.names[context] for _, context in met.items[:4]} == {before}


def test_the_nll_of_a_stock_model_is_that_of_the_run(tmp_path: Path) -> None:
    base, data = tiny_base("llama"), made()
    for number, item in enumerate(data.pool.contexts):
        ours = gold_nll(base, item.context, item.encoded).mean
        found = gold_nll_of(base.model, [data.item(row, number) for row in range(12)], 5)
        assert found == pytest.approx(ours, abs=1e-5)


def test_the_wording_probe_logs_each_wording_their_mean_and_spread(tmp_path: Path) -> None:
    held_out, data = made(count=20), made(ORIGINAL)
    probe = WordingProbe(held_out, every=4)
    told: list[dict[str, Any]] = []
    trainer = trained(tmp_path, data, [ContextClock(data), probe, Watch(told)])
    last = [gold_nll_of(trainer.model.eval(), [held_out.item(r, c) for r in range(20)], 16) for c in range(3)]
    assert [step for step, _ in logged(trainer, "wording_nll")] == [0, 4, 6]
    values = {name: logged(trainer, name)[-1][1] for name in ("wording_nll/short", "wording_nll", "wording_spread")}
    wanted = {"wording_nll/short": last[1], "wording_nll": sum(last) / 3, "wording_spread": max(last) - min(last)}
    assert values == pytest.approx(wanted, abs=1e-5)
    assert sum("wording_nll" in line for line in told) == 3, "in the trainer's own lines too"


class Watch(TrainerCallback):
    def __init__(self, told: list[dict[str, Any]]) -> None:
        self.told = told

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
        self.told.append(dict(logs))


def test_with_report_the_trainer_s_reporters_see_it(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    probe, data = WordingProbe(made(), every=2), made(ORIGINAL)
    trainer = Trainer(model(), arguments(tmp_path), ContextCollator(), data, callbacks=[Watch(told), probe])
    probe.report = trainer.log
    trainer.train()
    assert sum("wording_nll" in line for line in told) == 4
    assert [step for step, _ in logged(trainer, "wording_nll")] == [0, 2, 4, 6]


@pytest.mark.parametrize("method", ["full", "lora", "given"])
def test_forgetting_is_the_kl_of_the_base_to_the_model_on_the_probes(tmp_path: Path, method: str) -> None:
    base = tiny_base("llama")
    probes = ContextDataset(
        [{"prompt": row["text"], "output": row["output"]} for row in rows(7)],
        [{"role": "user", "content": "{{prompt}}"}],
        base.tokenizer,
    )
    data = made(ORIGINAL)
    one = with_lora(model()) if method == "lora" else model()
    given = copy.deepcopy(base.model) if method == "given" else None
    probe = ForgettingProbe(probes, base=given, every=3, batch_size=3)
    trainer = trained(tmp_path, data, [ContextClock(data), probe], one)
    measured = logged(trainer, "forgetting_kl")
    assert [step for step, _ in measured] == [0, 3, 6]
    if method != "lora":  # whose adapters are random at first
        assert measured[0][1] == pytest.approx(0, abs=1e-6)
    assert measured[-1][1] > 0.01
    student = copy.copy(base)
    student.model = trainer.model.merge_and_unload() if method == "lora" else trainer.model
    student.__dict__.pop("head", None)
    item = probes.pool.contexts[0]
    reference = build_reference(base, item.context.prefix(base), item.encoded, tmp_path / "reference", batch_size=4)
    lines = likelihoods(student, base, item.context.prefix(student), item.encoded.rows, reference, batch_size=4)
    wanted = sum(line.kl for line in lines) / sum(line.gold_tokens for line in lines)
    assert measured[-1][1] == pytest.approx(wanted, rel=1e-3)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its schedule is 'resample'"):
        StateAdaptive(made())
    with pytest.raises(InputError, match="every 0"):
        WordingProbe(made(), every=0)
    data = made(schedule=ADAPTIVE)
    with pytest.raises(InputError, match="dataloader_num_workers: rows are fetched by worker processes"):
        trained(tmp_path, data, [StateAdaptive(data)], dataloader_num_workers=1)
    state = SimpleNamespace(global_step=3, log_history=[])
    with pytest.raises(InputError, match=r"ForgettingProbe: training goes on from a checkpoint.*base="):
        ForgettingProbe(made()).on_train_begin(None, state, None, model=model())


def test_trl_trains_on_the_same_items(tmp_path: Path) -> None:
    import trl

    data = made(schedule={"kind": "resample", "every": 1}, seed=1)
    settings = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    settings |= {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 0.01, "logging_steps": 1}
    settings |= {
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        "bf16": False,
    }
    probe = WordingProbe(made(), every=3)
    theirs = trl.SFTTrainer(
        model=model(),
        args=trl.SFTConfig(str(tmp_path / "trl"), gradient_checkpointing=False, **settings),
        train_dataset=data.for_trl(),
        processing_class=tiny_tokenizer("chatml"),
        callbacks=[ContextClock(data), probe],
    )
    theirs.train()
    stock = trained(tmp_path / "stock", data, [ContextClock(data), WordingProbe(made(), every=3)])
    assert dict(logged(theirs, "loss")) == pytest.approx(dict(logged(stock, "loss")), abs=1e-4)
    assert dict(logged(theirs, "wording_nll")) == pytest.approx(dict(logged(stock, "wording_nll")), abs=1e-4)
    assert json.dumps(theirs.state.log_history)


def test_the_example_beside_a_stock_trl_trainer_runs(tmp_path: Path) -> None:
    job = write_job(tmp_path, lambda config: config.update(contexts=[]))
    run_job(job, tmp_path / "out")
    script = Path(__file__).parents[2] / "examples/train-with-trl.py"
    command = [sys.executable, str(script), str(tmp_path / "out"), str(tiny_folder("llama")), "8"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [ast.literal_eval(line) for line in done.stdout.splitlines() if "epoch" in line]
    probes = [line for line in lines if "step" in line]  # the others are the trainer's own
    assert [line["step"] for line in probes if "wording_nll" in line] == [0, 8]
    assert [line["step"] for line in probes if "forgetting_kl" in line] == [0, 8]
    assert sum(name.startswith("wording_nll/") for name in probes[0]) == 4
    assert (tmp_path / "exports/student/model.safetensors").is_file()
