"""Answer after a stored KV prefix with plain transformers (5 or later), nothing else.

    python generate.py --base MODEL --replaced N "a whole prompt" "another one"

where N is how many ids at the start of a prompt the prefix stands for, as README.md says; prompts are cut as ids,
because text that is cut there can have other ids.

prefix.safetensors holds, for each layer i, ``layers.i.keys`` and ``layers.i.values`` [heads, slots, head_dim]; keys are
rotated for positions 0 … slots − 1, so what you feed starts at position ``slots``. That is the default once the
attention mask counts the slots.
"""

from __future__ import annotations

import argparse
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

FOLDER = Path(__file__).resolve().parent
Prefix = list[tuple[torch.Tensor, torch.Tensor]]


def load_prefix(folder: Path | str = FOLDER) -> Prefix:
    """Keys and values [heads, slots, head_dim] of each layer, in order."""
    stored = load_file(Path(folder) / "prefix.safetensors")
    return [(stored[f"layers.{i}.keys"], stored[f"layers.{i}.values"]) for i in range(len(stored) // 2)]


def prefix_cache(model: Any, prefix: Prefix, rows: int) -> DynamicCache:
    """A cache that starts as the prefix in every row. It grows with the text: make a fresh one for each batch."""
    cache = DynamicCache(config=model.config)
    for layer, (keys, values) in enumerate(prefix):
        pair = (t.to(model.device, model.dtype).expand(rows, *t.shape) for t in (keys, values))
        cache.update(*pair, layer)
    return cache


@torch.no_grad()
def logits(model: Any, prefix: Prefix, bodies: list[list[int]]) -> list[torch.Tensor]:
    """Logits [tokens, vocabulary] of each body after the prefix, in one batch padded on the right."""
    slots, width = prefix[0][0].shape[1], max(map(len, bodies))
    ids = torch.zeros(len(bodies), width, dtype=torch.long)
    mask = torch.ones(len(bodies), slots + width, dtype=torch.long)
    for row, body in enumerate(bodies):
        ids[row, : len(body)] = torch.tensor(body)
        mask[row, slots + len(body) :] = 0
    cache = prefix_cache(model, prefix, len(bodies))
    out = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), past_key_values=cache).logits
    return [row[: len(body)] for row, body in zip(out, bodies, strict=True)]


@torch.no_grad()
def generate(
    model: Any, prefix: Prefix, bodies: list[list[int]], batch_size: int = 16, **options: Any
) -> list[list[int]]:
    """New token ids for each body, in order; ``options`` go to ``model.generate``.

    Batches are padded on the left. Sliding-window layers count padding as distance, so models that have them get
    batches of bodies of equal length.
    """
    sliding = "sliding_attention" in (getattr(model.config.get_text_config(), "layer_types", None) or ())
    answers: list[list[int]] = [[] for _ in bodies]
    order = sorted(range(len(bodies)), key=lambda i: len(bodies[i]))
    for _, members in groupby(order, key=lambda i: len(bodies[i]) if sliding else 0):
        group = list(members)
        for start in range(0, len(group), batch_size):
            chosen = group[start : start + batch_size]
            for i, answer in zip(chosen, _batch(model, prefix, [bodies[i] for i in chosen], options), strict=True):
                answers[i] = answer
    return answers


def _batch(model: Any, prefix: Prefix, bodies: list[list[int]], options: dict) -> list[list[int]]:
    slots, width = prefix[0][0].shape[1], max(map(len, bodies))
    ids = torch.zeros(len(bodies), width, dtype=torch.long)
    mask = torch.ones(len(bodies), slots + width, dtype=torch.long)
    for row, body in enumerate(bodies):
        ids[row, width - len(body) :] = torch.tensor(body)
        mask[row, slots : slots + width - len(body)] = 0
    settings = {"do_sample": False, "max_new_tokens": 64, **options}
    ends = settings.get("eos_token_id", model.generation_config.eos_token_id)
    ends = set(ends) if isinstance(ends, (list, tuple, set)) else {ends}
    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),  # slots + width: the slots must be counted
        past_key_values=prefix_cache(model, prefix, len(bodies)),
        pad_token_id=model.generation_config.pad_token_id or 0,
        **settings,
    )
    return [_until(row[width:].tolist(), ends) for row in out]


def _until(tokens: list[int], ends: set) -> list[int]:
    """The tokens before the first one that ends an answer."""
    return next((tokens[:i] for i, token in enumerate(tokens) if token in ends), tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer after a stored KV prefix.")
    parser.add_argument("prompts", nargs="+", help="whole prompts, chat marks included")
    parser.add_argument("--replaced", type=int, required=True, help="ids of a prompt that the context stands for")
    parser.add_argument("--special-tokens", action="store_true", help="let the tokenizer add its own (BOS)")
    parser.add_argument("--base", required=True, help="the model that the context was made for")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    model = AutoModelForCausalLM.from_pretrained(args.base).eval()
    whole = [tokenizer(text, add_special_tokens=args.special_tokens)["input_ids"] for text in args.prompts]
    ids = [prompt[args.replaced :] for prompt in whole]
    for answer in generate(model, load_prefix(), ids, max_new_tokens=args.max_new_tokens):
        print(tokenizer.decode(answer, skip_special_tokens=True))


if __name__ == "__main__":
    main()
