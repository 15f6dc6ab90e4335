"""The ``data`` section: where the examples are, and which of them are used for what."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from kvopt.config.section import Section

Policy = Literal["error", "warn", "drop"]


class RowLimits(Section):
    """How many rows of each part are used; None means all."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    train: int | None = Field(default=None, ge=1)
    """Rows for gradients, from the top of the training file."""
    selection: int = Field(default=32, ge=1)
    """Rows that choose mutations and checkpoints: the training file's next ones, else some of its first."""
    validation: int | None = Field(default=None, ge=1)
    """Rows that are only reported."""


class DataConfig(Section):
    """Where the examples are: slot values and gold outputs."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    train: str
    """A .jsonl, .json, .csv or .tsv file, a folder of datasets.save_to_disk, hf:NAME[:CONFIG][:SPLIT], or
    builtin:stdlib-docstrings. Paths are relative to the config file."""
    validation: str | None = None
    """As train. Without it, a part of the training rows is set aside (validation_fraction)."""
    output: str = "output"
    """Column of the gold output, or a path like messages.assistant."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Slot name to column, or to a path like messages.user, where the two names differ."""
    only: dict[str, str] = Field(default_factory=dict)
    """Column or path to a regular expression: rows in which one of them is not found are left out, in every part. Tasks
    of a sequence can share one file this way."""
    limit: RowLimits = Field(default_factory=RowLimits)
    """How many rows of each part are used."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training rows to set aside, chosen by a hash of their values, when there is no validation file."""
    duplicates: Policy = "warn"
    """What to do about rows that come twice in one part; drop keeps the first."""
    leakage: Policy = "error"
    """What to do about training rows whose values are also in the validation part; drop removes the training row."""
