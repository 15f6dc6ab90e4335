"""Models for ``tools/gpu_check.sh`` that need no download: the shape of a real model, random weights that are made on
the device, a made-up tokenizer, and a task for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

from kvopt.base.flex import with_flex
from kvopt.base.loading import Base
from kvopt.base.probe import probe
from kvopt.config.model import ModelConfig
from kvopt.contexts import TextContext
from kvopt.task.examples import Example
from kvopt.task.seam import Encoded, Encoder
from kvopt.task.template import Template

GEOMETRIES: dict[str, tuple[type, dict[str, Any]]] = {
    "Qwen3-4B geometry": (
        Qwen3Config,
        {
            "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
            "tie_word_embeddings": True,
        },
    ),
    "Llama-3-8B geometry": (
        LlamaConfig,
        {
            "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
        },
    ),
}  # fmt: skip
TINY = {
    "vocab_size": 2500, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip
"""What stands in for the sizes of a geometry where only the way is checked; a head_dim is made another, but kept."""


@dataclass(frozen=True)
class Sizes:
    """Of a task: tokens of the template, of a body and of a gold output, rows, and text mutations to score."""

    template: int
    body: int
    gold: int
    rows: int
    mutations: int
    slots: int
    batch: int


SIZES = {
    # A step of 16 rows of 160 tokens keeps some 7 MB of activations a token on the 8B geometry: 18 GB, beside 16 GB of
    # weights. PEFT's full logits of those rows add 2 x 0.7 GB in bf16, and 1,536 gold tokens six float32 tensors of
    # 0.8 GB: 40 GB in all, half of an 80 GB card.
    "full": Sizes(template=1024, body=64, gold=96, rows=32, mutations=4, slots=64, batch=16),
    "small": Sizes(template=60, body=8, gold=6, rows=6, mutations=2, slots=8, batch=4),
}


def random_base(
    name: str,
    size: str,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    layers: int | None = None,
    say: Callable[[str], None] = print,
) -> Base:
    """A base of that geometry (a tiny one with ``size`` "small"), in bfloat16 on a GPU, else float32. Its weights are
    drawn on the device itself.

    Args:
        dtype: another dtype.
        layers: fewer layers, and then a small vocabulary too.
        say: gets the reason where FlexAttention cannot be used.
    """
    kind, values = GEOMETRIES[name]
    if size == "small":
        values = values | TINY | ({"head_dim": 20} if "head_dim" in values else {})
    if layers is not None:
        values = values | {"num_hidden_layers": layers, "vocab_size": TINY["vocab_size"]}
    config = kind(**values, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.requires_grad_(False).eval()
    words = tokenizer()
    ordinary = list(islice((i for i in range(300, len(words))), 5))
    found = with_flex(model, ordinary, probe(model, ordinary, name), ModelConfig(), say)
    identity: dict[str, str | None] = dict.fromkeys(("weights", "config", "tokenizer"), f"random: {name}, {size}")
    return Base(model, words, name, device, dtype, found.geometry, identity | {"chat_template": None}, found)


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that gives each word of :func:`vocabulary` about one token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([" " + " ".join(vocabulary())] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def vocabulary() -> list[str]:
    """Three hundred made-up words, always the same."""
    rng = Random(0)
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    return sorted({"".join(rng.choices(syllables, k=rng.randint(2, 3))) for _ in range(330)})[:300]


@dataclass(frozen=True)
class MadeUpTask:
    """A long template over random words, its rows, and the same rules in other orders."""

    original: TextContext
    mutations: list[TextContext]

    @property
    def encoded(self) -> Encoded:
        return self.original.encoded


def made_up_task(base: Base, sizes: Sizes) -> MadeUpTask:
    """The task in the base's own tokens; lengths are those of ``sizes`` where a word is one token."""
    rng, words = Random(1), vocabulary()
    rules = [" ".join(rng.choices(words, k=14)) for _ in range(max(2, sizes.template // 16))]
    examples = []
    for number in range(sizes.rows):
        text, output = (" ".join(rng.choices(words, k=k)) for k in (sizes.body, sizes.gold))
        examples.append(Example(f"row:{number}", {"text": text}, output, f"made up:{number + 1}"))

    encoder = Encoder(base.tokenizer)

    def context(name: str, turn: int) -> TextContext:
        lines = "\n".join(f"- {rule}" for rule in rules[turn:] + rules[:turn])
        template = Template.from_text(f"{lines}\nRequest: {{{{text}}}}\nAnswer:\n")
        return TextContext(name, template, encoder.encode(template, examples))

    turns = [1 + number * (len(rules) - 1) // sizes.mutations for number in range(sizes.mutations)]
    return MadeUpTask(context("original", 0), [context(f"turned by {turn}", turn) for turn in turns])


def stored_base(folder: Path, device: torch.device) -> Base:
    """A model folder, in the device's own dtype."""
    from kvopt.base.loading import load_base

    return load_base(ModelConfig(base=str(folder), device=str(device)), say=lambda line: None)
