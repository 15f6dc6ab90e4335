"""``--verify trl``: what TRL's ``SFTTrainer`` makes of exported rows, beside the ids and labels that are ours.

The trainer itself prepares the rows, with a model of a few weights: what it does is asked of it, not written down here.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from kvopt.errors import InputError, counted
from kvopt.export.row_formats import IGNORED

SHOWN = 10
UNREAD = {"alpaca": "TRL has no reader for alpaca rows"}


@dataclass(frozen=True)
class RowDifference:
    """Where TRL differs from us in one row: tokens more (or fewer, negative) than ours, tokens that are others, and
    tokens that count in the loss more (or fewer).
    """

    row: int
    where: str
    tokens: int
    changed: int
    labels: int

    def __str__(self) -> str:
        parts = [f"{self.tokens:+d} tokens"] if self.tokens else []
        parts += [f"{counted(self.changed, 'other token')}"] if self.changed else []
        parts += [f"the loss counts {self.labels:+d} tokens"] if self.labels else []
        return f"row {self.row} ({self.where}): {', '.join(parts) or 'the loss counts other tokens'}"


def check_trl(what: str) -> None:
    """Refuse, before any work, a check by another tool, or by TRL where it is not installed. Raises InputError."""
    if what != "trl":
        raise InputError(f"no check {what!r}", where="--verify", fix="trl")
    if find_spec("trl") is None:
        raise InputError("TRL is not installed", where="--verify trl", fix='pip install "trl>=1.16"')


def trl_differences(
    rows: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]], tokenizer: Any, format: str, eos: str | None
) -> list[RowDifference]:
    """The rows that TRL makes other ids or labels of.

    Args:
        rows: as they were written.
        ours: the same in the format ``tokens``.
        tokenizer: the base's.
        format: of the rows.
        eos: ``SFTConfig.eos_token``; None: the tokenizer's.

    Raises:
        InputError: rows that TRL cannot read, with what it says.
    """
    if format in UNREAD:
        raise InputError(UNREAD[format], where="--verify trl", fix="use it with another --format")
    theirs = _prepared(rows, tokenizer, eos)
    found = []
    for i, (their, our) in enumerate(zip(theirs, ours, strict=True)):
        if their["input_ids"] == our["input_ids"] and their["labels"] == our["labels"]:
            continue
        pairs = zip(their["input_ids"], our["input_ids"], strict=False)
        counts = [sum(label != IGNORED for label in one["labels"]) for one in (their, our)]
        longer = len(their["input_ids"]) - len(our["input_ids"])
        where = f"{our['context_id']}, {our['example_id']}"
        found.append(RowDifference(i, where, longer, sum(a != b for a, b in pairs), counts[0] - counts[1]))
    return found


def _prepared(rows: Sequence[dict[str, Any]], tokenizer: Any, eos: str | None) -> list[dict[str, Any]]:
    """``input_ids`` and ``labels`` that a stock ``SFTTrainer`` trains on."""
    from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=max(len(tokenizer), tokenizer.vocab_size), **sizes))
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            folder, report_to=[], use_cpu=True, bf16=False, max_length=None, eos_token=eos, disable_tqdm=True
        )
        shown = not are_progress_bars_disabled()
        disable_progress_bars()
        try:
            trainer = SFTTrainer(
                model=model,
                args=settings,
                train_dataset=Dataset.from_list([dict(row) for row in rows]),
                processing_class=copy.deepcopy(tokenizer),
            )
        except Exception as error:  # a chat template, or TRL, refuses the rows in its own way
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"TRL cannot read these rows: {reason}", where="--verify trl") from error
        finally:
            if shown:
                enable_progress_bars()
        return [{key: row[key] for key in ("input_ids", "labels")} for row in trainer.train_dataset]
