"""``kvopt validate``: everything that can be checked without the model's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvopt.config import Config
from kvopt.dataset import load_dataset
from kvopt.encoding import Encoder
from kvopt.model import load_tokenizer


def check(config: Config, base_dir: Path) -> dict[str, Any]:
    """Read template and data, place the seam on every row, and say what there is. Raises InputError for the first
    fault.
    """
    template = config.template.build(base_dir)
    dataset = load_dataset(config.data, template, base_dir, config.seed)
    tokenizer, window = load_tokenizer(config.model)
    encoder = Encoder(tokenizer, config.template.chat_kwargs, config.template.end_token)
    encoded = encoder.encode(template, (*dataset.train, *dataset.selection, *dataset.validation), window=window)
    longest = max(len(encoded.prefix) + len(row) for row in encoded.rows)
    return {
        "template": "chat messages" if template.is_chat else "text",
        "slots": list(template.slots),
        "context_tokens": len(encoded.prefix),
        "rows": {split: len(getattr(dataset, split)) for split in ("train", "selection", "validation")},
        "gold_tokens": encoded.gold_tokens,
        "longest_row_tokens": longest,
        "context_window": window,
        "context_ends_with": tokenizer.decode(encoded.prefix[-8:]),
        "first_body": tokenizer.decode(encoded.rows[0].body),
        "first_gold": tokenizer.decode(encoded.rows[0].gold),
        "warnings": list(dataset.warnings),
    }
