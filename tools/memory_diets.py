"""What the stages of kvopt hold in memory on bases of 8B and 70B: the table of ``docs/gpu.md``.

Weights are counted on the meta device, the rest by formula from the limits in the code. Nothing is loaded or measured.

Symbols: N parameters, L layers, H key/value heads, d head dimension, D hidden size, V vocabulary, T slots, Q queries of
a key/value head, P tokens of the template, G gold tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvopt.contexts.compaction import MAX_QUERIES
from kvopt.kernels.products import VOCABULARY_BLOCK
from kvopt.measure.reference import ROWS_PER_SHARD, TOKENS_PER_SHARD
from kvopt.train.merging.weight_files import SHARD_BYTES

TEMPLATE, ROWS, GOLD, BATCH = 1024, 512, 1500, 16
GEOMETRIES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
"""Of Llama 3.1; both have 8 key/value heads of 128 features and a vocabulary of 128,256."""
SHARED = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False}
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
"""Of a weight: 4 bits, 8 for a scale of each 64, 32 for the scale of each 256 scales (QLoRA, section 3)."""


@dataclass(frozen=True)
class Sizes:
    """A geometry, and the parameters of its decoder layers' matrices among all ``parameters``."""

    parameters: int
    packed: int
    layers: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocabulary: int


def sizes(name: str) -> Sizes:
    """A geometry of GEOMETRIES, its parameters counted on the meta device."""
    config = LlamaConfig(**SHARED, **GEOMETRIES[name])
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    packed = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2)
    count = sum(p.numel() for p in model.parameters())
    return Sizes(count, packed, config.num_hidden_layers, 8, 128, config.hidden_size, config.vocab_size)


def rows(of: Sizes) -> list[tuple[str, str, float, float]]:
    """(stage, what is held now, bytes before, bytes now)."""
    n, largest = of.parameters, of.vocabulary * of.hidden
    context = TEMPLATE * of.layers * 2 * of.kv_heads * of.head_dim * 4
    long_rows, moments = ROWS_PER_SHARD * GOLD * of.hidden * 2, ROWS * GOLD * (of.hidden + 2) * 4
    return [
        ("loading in 16 bits, host", "2 V D: one tensor on its way", 2 * n, 2 * largest),
        ("loading in 16 bits, GPU", "2 N", 2 * n, 2 * n),
        (
            "the same with `quantization: nf4`, GPU",
            "0.52 bytes a layer's weight, 2 of head and embeddings",
            2 * n,
            of.packed * NF4_BYTES + 2 * (n - of.packed),
        ),
        (
            f"optimizing a KV context of {TEMPLATE:,} slots, GPU",
            "20 T L 2 H d: each tensor once",
            7 * context,
            5 * context,
        ),
        ("its checkpoint while it is written, host", "16 T L 2 H d", 12 * context, 4 * context),
        (
            f"`init: matched` of {TEMPLATE:,} tokens, its statistics",
            "12 H Q d: one layer's queries, reads and targets",
            of.layers * of.kv_heads * 2048 * TEMPLATE * 4,
            3 * of.kv_heads * MAX_QUERIES * of.head_dim * 4,
        ),
        (
            f"reference of rows of {GOLD:,} gold tokens, host",
            "2 G D of a shard",
            3 * long_rows,
            TOKENS_PER_SHARD * of.hidden * 2,
        ),
        (
            f"moments of {ROWS} such rows, host",
            f"4 G D of a batch of {BATCH}",
            moments,
            moments * BATCH / ROWS,
        ),
        (
            "samples: the head in float32",
            f"4 D of {VOCABULARY_BLOCK:,} rows at a time",
            4 * largest,
            4 * VOCABULARY_BLOCK * of.hidden,
        ),
        ("making a full student in float32", "6 N: base and masters", 8 * n, 6 * n),
        (
            "a soup of two full students, host",
            "a file's part, and three copies of one tensor",
            16 * n,
            SHARD_BYTES + 16 * largest,
        ),
        (
            "LiNeS of a full student, host",
            "a file's part, and three copies of one tensor",
            12 * n,
            SHARD_BYTES + 12 * largest,
        ),
        ("converting a GGUF file, host", "10 V D: one tensor", 8 * n, 10 * largest),
    ]


def main() -> None:
    """Print the table."""
    small, large = (rows(sizes(name)) for name in ("8B", "70B"))
    print("| stage | held now | 8B before | 8B now | 70B before | 70B now |\n|---|---|---|---|---|---|")
    for (stage, held, before, now), (_, _, before_large, now_large) in zip(small, large, strict=True):
        figures = " | ".join(f"{value / 1e9:.1f}" for value in (before, now, before_large, now_large))
        print(f"| {stage} | {held} | {figures} |")


if __name__ == "__main__":
    main()
