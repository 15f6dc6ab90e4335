"""Tiny bases whose attention differs: grouped heads, sliding windows, softcaps, sinks. All were saved and loaded."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig

from kvopt.base.loading import Base, load_base
from kvopt.config.model import ModelConfig
from tests.tiny import tiny_base, tiny_tokenizer

BASES = ("llama", "qwen3", "gemma3", "gemma2", "gpt-oss")
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "pad_token_id": None,
}
SOFTCAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 16}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def saved(name: str, folder: Path) -> Path:
    """A folder with a random Gemma 2 (softcaps and every other layer sliding) or gpt-oss (sinks, too)."""
    words = tiny_tokenizer("chatml")
    sizes = SMALL | {"vocab_size": len(words)}
    config = Gemma2Config(**sizes, **SOFTCAPS) if name == "gemma2" else None
    config = config or GptOssConfig(**sizes, **EXPERTS, rope_parameters=ROPE)
    state = torch.random.get_rng_state()
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    torch.random.set_rng_state(state)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@cache
def base_of(name: str) -> Base:
    """One of BASES under default settings, in float32 on the CPU. Shared by all callers: do not change it."""
    if name in ("llama", "qwen3", "gemma3"):
        return tiny_base(name)
    with tempfile.TemporaryDirectory() as folder:
        return load_base(ModelConfig(base=str(saved(name, Path(folder))), dtype="float32", device="cpu"))
