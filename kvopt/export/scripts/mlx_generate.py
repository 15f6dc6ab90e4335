"""Answer after a stored KV prefix with mlx-lm (0.32 or later), nothing else.

    python mlx_generate.py --model MODEL --replaced N "a whole prompt"

where N is how many ids at the start of a prompt the prefix stands for, as README.md says; prompts are cut as ids,
because text that is cut there can have other ids.

prompt_cache.safetensors is a prompt cache as mlx_lm.models.cache.save_prompt_cache writes it: for each layer i keys
``i.0`` and values ``i.1`` [1, heads, slots, head_dim] and the number of slots ``i.2``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
FILE = FOLDER / "prompt_cache.safetensors"
OLDEST = (0, 32)


def check_version(installed: str) -> None:
    """Raises ImportError for an mlx-lm that reads another format."""
    if tuple(int(part) for part in installed.split(".")[:2]) < OLDEST:
        raise ImportError(f"mlx-lm {installed} reads another format of prompt caches: pip install -U 'mlx-lm>=0.32'")


def check_format(names: Collection[str], metadata: Mapping[str, str], file: object = FILE) -> None:
    """Raises ValueError for a file that is no prompt cache of mlx-lm 0.32 or later, by the names of its tensors and its
    metadata. Until 0.31 the classes of layers stood last, and the number of slots nowhere.
    """
    if metadata.get("2.0") == "KVCache" and "0.2" not in names:
        raise ValueError(f"{file} is a prompt cache of mlx-lm before 0.32, which 0.32 cannot read: write it again")
    if metadata.get("1.0") != "KVCache" or not {"0.0", "0.1", "0.2"} <= set(names):
        raise ValueError(f"{file} is no prompt cache of keys and values")


def load_model(name: str) -> tuple[Any, Any]:
    """Model and tokenizer, with the settings of mlx.json that mlx-lm does not find in the model's config.json."""
    from mlx_lm import load

    settings = json.loads((FOLDER / "mlx.json").read_text("utf-8"))
    return load(name, model_config=settings["model_config"])[:2]


def load_cache(file: Path | str = FILE) -> list[Any]:
    """A fresh cache of every layer, which starts as the prefix and grows with what the model reads after it."""
    import mlx.core as mx
    from mlx_lm.models.cache import load_prompt_cache

    check_version(version("mlx-lm"))
    tensors, metadata = mx.load(str(file), return_metadata=True)
    check_format(tensors, metadata, file)
    return load_prompt_cache(str(file))


def logits(model: Any, body: list[int], file: Path | str = FILE) -> Any:
    """Logits [tokens, vocabulary] of a body after the prefix."""
    import mlx.core as mx

    return model(mx.array([body]), cache=load_cache(file))[0]


def generate(model: Any, tokenizer: Any, body: list[int], max_tokens: int = 64, file: Path | str = FILE) -> list[int]:
    """The ids of a greedy answer to a body after the prefix, without the one that ends it."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    answer: list[int] = []
    for token, _ in generate_step(mx.array(body), model, max_tokens=max_tokens, prompt_cache=load_cache(file)):
        if int(token) in tokenizer.eos_token_ids:
            break
        answer.append(int(token))
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer after a stored KV prefix with mlx-lm.")
    parser.add_argument("prompts", nargs="+", help="whole prompts, chat marks included")
    parser.add_argument("--replaced", type=int, required=True, help="ids of a prompt that the context stands for")
    parser.add_argument("--special-tokens", action="store_true", help="let the tokenizer add its own (BOS)")
    parser.add_argument("--model", required=True, help="the base, or a conversion of the same weights")
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()
    model, tokenizer = load_model(options.model)
    for prompt in options.prompts:
        ids = tokenizer.encode(prompt, add_special_tokens=options.special_tokens)[options.replaced :]
        if not ids:
            parser.error(f"the prompt has no ids after the first {options.replaced}")
        print(tokenizer.decode(generate(model, tokenizer, ids, options.max_tokens)))


if __name__ == "__main__":
    main()
