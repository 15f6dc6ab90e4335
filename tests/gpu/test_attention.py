"""Rows packed behind a shared prefix on the device: the states of padded rows, and the gradients by the prefix.

On a GPU the packed rows go through compiled FlexAttention; on a CPU through a mask of numbers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from kvopt.base.flex import NAME
from kvopt.base.loading import Base, load_base
from kvopt.base.prefix import packing_for, prefill
from kvopt.config.model import ModelConfig
from tests.attentions import BASES, SMALL, saved
from tests.gpu.device import DEVICE, ON_GPU
from tests.test_packing import ragged_batch, states_and_gradient
from tests.tiny import save_tiny, tiny_tokenizer

pytestmark = pytest.mark.gpu


def base_on_device(name: str, folder: Path) -> Base:
    """One of BASES, with heads of 16 features: a GPU's kernel takes no smaller ones."""
    if name in ("qwen3", "gemma3"):
        save_tiny(folder, name, "chatml")
    elif name == "llama":
        words = tiny_tokenizer("chatml")
        sizes = {key: value for key, value in SMALL.items() if key != "sliding_window"}
        torch.manual_seed(3)
        AutoModelForCausalLM.from_config(LlamaConfig(**sizes, vocab_size=len(words))).save_pretrained(folder)
        words.save_pretrained(folder)
    else:
        saved(name, folder)
    return load_base(ModelConfig(base=str(folder), dtype="float32", device=str(DEVICE)))


@pytest.mark.parametrize("name", BASES)
def test_packed_rows_have_the_states_and_gradients_of_padded_ones(name: str, tmp_path: Path) -> None:
    base, batch = base_on_device(name, tmp_path), ragged_batch().to(DEVICE)
    packing = packing_for(base, batch, 150)
    assert packing is not None
    assert packing.in_blocks == ON_GPU
    assert (base.model.config._attn_implementation == NAME) == ON_GPU
    with torch.no_grad():
        prefix = prefill(base, ids=torch.arange(20, 170, device=DEVICE))
    packed = states_and_gradient(base, prefix, batch)
    padded = states_and_gradient(replace(base, attention="padded"), prefix, batch)
    for ours, theirs in zip(packed, padded, strict=True):
        assert theirs.norm() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
