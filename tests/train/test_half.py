"""Half Fine-Tuning freezes half of every kind, another half each epoch, and the same halves after a resume."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from kvopt.train.half import HalfFineTuning, frozen_half
from tests.tiny import tiny_model

NAMES = [f"model.layers.{i}.self_attn.{kind}.weight" for i in range(6) for kind in ("q_proj", "k_proj")]
OUTSIDE = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]


class Rows(Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(8) * (index + 1) % 50
        return {"input_ids": ids, "labels": ids}


def trainer(folder, model, epochs, callback=None):
    arguments = TrainingArguments(
        str(folder), num_train_epochs=epochs, per_device_train_batch_size=2, save_strategy="epoch", report_to=[],
        learning_rate=0.01, weight_decay=0.1, use_cpu=True, disable_tqdm=True, logging_strategy="no", seed=3,
        lr_scheduler_type="constant",
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=Rows(), callbacks=[callback or HalfFineTuning(5)])


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_half_of_every_kind_is_frozen_and_nothing_outside_the_layers():
    frozen = frozen_half(NAMES + OUTSIDE, seed=0, epoch=0)
    assert Counter(name.split(".")[-2] for name in frozen) == {"q_proj": 3, "k_proj": 3}


def test_an_odd_number_of_layers_freezes_the_odd_one_by_a_coin():
    counts = {len(frozen_half(NAMES[:6:2], seed, 0)) for seed in range(20)}
    assert counts == {1, 2}


def test_halves_are_a_function_of_seed_and_epoch():
    drawn = [frozen_half(NAMES, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(drawn)) == 4
    assert drawn[3] == frozen_half(reversed(NAMES), 1, 1)


def test_frozen_parameters_do_not_change_and_all_others_do(tmp_path):
    model = tiny_model("llama", 60)
    before = state(model)
    trainer(tmp_path, model, 1).train()
    after = state(model)
    frozen = frozen_half(before, 5, 0)
    assert {name for name in before if torch.equal(before[name], after[name])} == frozen
    assert all(p.requires_grad for p in model.parameters())


def test_another_half_is_frozen_in_the_next_epoch(tmp_path):
    seen = []

    class Recorder(HalfFineTuning):
        def on_epoch_end(self, args, state_, control, *, model, **kwargs):
            seen.append(state(model))

    model = tiny_model("llama", 60)
    trainer(tmp_path, model, 2, Recorder(5)).train()
    first, second = seen
    assert {name for name in first if torch.equal(first[name], second[name])} == frozen_half(first, 5, 1)
    assert frozen_half(first, 5, 1) != frozen_half(first, 5, 0)


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path):
    start = tiny_model("llama", 60)
    whole = deepcopy(start)
    trainer(tmp_path / "whole", whole, 3).train()
    trainer(tmp_path / "cut", deepcopy(start), 1).train()
    resumed = deepcopy(start)
    trainer(tmp_path / "cut", resumed, 3).train(resume_from_checkpoint=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
