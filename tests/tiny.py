"""Tiny random models and tokenizers, made on the spot: `from tests.tiny import tiny_base` works in every test file.

Everything is seeded and float32. Models: llama (grouped KV heads), qwen3 (head_dim is not hidden / heads), gemma3
(sliding windows of 8 tokens in every other layer, two RoPE thetas, scaled embeddings). Tokenizers: chatml (byte-level
BPE with SmolLM2's template and its default system prompt), llama2 (Metaspace BPE with byte fallback, a leading bos,
contents trimmed, turn marks that are plain text), gemma (no space put in front, special turn tokens), plain
(byte-level, no chat template).
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kvopt.base.loading import Base, load_base
from kvopt.config.model import ModelConfig

MODELS = ("llama", "qwen3", "gemma3")
TOKENIZERS = ("chatml", "llama2", "gemma", "plain")
PARTNER = {"llama": "chatml", "qwen3": "plain", "gemma3": "gemma"}
"""The tokenizer that :func:`tiny_base` takes for a model unless told otherwise."""

SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "pad_token_id": None,
}
"""Sizes of a tiny model of any architecture."""
WINDOW = 512
SLIDING = 8
CORPUS = [
    "Sort the message into one of the labels below and answer with the label alone.",
    "You are a careful assistant who reads the request twice and answers in one short line.",
    "The user wants to book a table for two at eight in the evening, near the old harbour.",
    "Play the second song of the album again, and then add it to my quiet morning list.",
    "What will the weather be like in the mountains tomorrow afternoon? Bring an umbrella.",
    "Rate this book four out of six points; search for the author's other novels.",
    'def area(width, height):\n    """Return the area of a rectangle."""\n    return width * height\n',
    '{"label": "weather", "confidence": 0.93, "words": ["rain", "wind", "cold"]}',
    "1. Read the text.\n2. Find the label.\n3. Write it down, and nothing else.",
    "Über den Wolken, così è la vita, à bientôt: other languages use other letters.",
]
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set start = '<<SYS>>\n' + messages[0]['content'] | trim + '\n<</SYS>>\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set start = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (start if loop.first else '') + message['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set start = messages[0]['content'] | trim + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set start = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (start if loop.first else '') + message['content'] | trim }}"
    "{{ '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


@cache
def tiny_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """One of TOKENIZERS, trained on CORPUS (300 to 500 tokens). Shared by all callers: do not change it."""
    if kind in ("chatml", "plain"):
        return _byte_level(kind)
    return _metaspace(kind)


def _byte_level(kind: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] if kind == "chatml" else ["<|endoftext|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    if kind == "plain":
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHATML,
    )


def _metaspace(kind: str) -> PreTrainedTokenizerFast:
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    learner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=170, show_progress=False))
    special = ["<unk>", "<s>", "</s>"] if kind == "llama2" else ["<unk>", "<bos>", "<eos>", "<pad>"]
    special += ["<start_of_turn>", "<end_of_turn>"] if kind == "gemma" else []
    learned = _model_state(learner)
    pieces = [
        *special,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *sorted(learned["vocab"], key=learned["vocab"].get),
    ]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(pair) for pair in learned["merges"]]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "llama2":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(steps)
    bos = special[1]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocabulary[bos])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token=bos,
        eos_token=special[2],
        pad_token=special[3] if kind == "gemma" else None,
        chat_template=LLAMA2 if kind == "llama2" else GEMMA,
    )


def _model_state(tokenizer: Tokenizer) -> dict[str, Any]:
    return json.loads(tokenizer.to_str())["model"]


def tiny_model(kind: str, vocab_size: int, **changes: Any) -> PreTrainedModel:
    """A random model of MODELS in float32, eval mode; ``changes`` override its configuration. Weights are large
    enough for contexts to matter."""
    shared = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "max_position_embeddings": WINDOW,
        "initializer_range": 0.25,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    own: dict[str, Any]
    if kind == "llama":
        config, build = LlamaConfig, LlamaForCausalLM
        own = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    elif kind == "qwen3":
        config, build = Qwen3Config, Qwen3ForCausalLM
        own = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        own |= {"tie_word_embeddings": False}
    elif kind == "gemma3":
        config, build = Gemma3TextConfig, Gemma3ForCausalLM
        own = {"num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
        own |= {"sliding_window": SLIDING, "query_pre_attn_scalar": 16}
        own |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
    else:
        raise ValueError(f"no tiny model {kind!r}; there are {MODELS}")
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(20)
        return build(config(**(shared | own | changes))).float().eval()
    finally:
        torch.random.set_rng_state(state)


@cache
def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="kvopt-tiny-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


@cache
def tiny_folder(kind: str, tokenizer: str | None = None) -> Path:
    """A model folder (safetensors, config, tokenizer) of a tiny model; read only, made once a process."""
    tokenizer = tokenizer or PARTNER[kind]
    folder = _root() / f"{kind}-{tokenizer}"
    save_tiny(folder, kind, tokenizer)
    return folder


def save_tiny(folder: Path, kind: str, tokenizer: str, **changes: Any) -> Path:
    """Write a fresh tiny model with its tokenizer into ``folder``, for tests that change the files."""
    words = tiny_tokenizer(tokenizer)
    tiny_model(kind, len(words), **changes).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@cache
def tiny_base(kind: str = "llama", tokenizer: str | None = None) -> Base:
    """A loaded tiny base on the CPU in float32. Shared by all callers: do not change it."""
    return load_base(ModelConfig(base=str(tiny_folder(kind, tokenizer)), dtype="float32", device="cpu"))
