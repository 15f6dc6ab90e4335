"""The ``data`` section: where the examples are, and which of them are used for what."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from kvopt.config.section import Section

Policy = Literal["error", "warn", "drop"]


class RowLimits(Section):
    """How many rows of each part are used; null uses all training or validation rows."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    train: int | None = Field(default=None, ge=1)
    """Rows to learn from, from the top of the training file."""
    selection: int = Field(default=32, ge=1)
    """Rows that choose mutations and checkpoints: those after the training rows, or some of these if there are none."""
    validation: int | None = Field(default=None, ge=1)
    """Rows for the reported scores; nothing is learned or chosen on them."""


class DataConfig(Section):
    """Where the examples are: slot values and gold outputs."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    train: str
    """A .jsonl, .json, .csv or .tsv file, a folder of datasets.save_to_disk, hf:NAME[:CONFIG][:SPLIT], or
    builtin:stdlib-docstrings (short outputs) or builtin:stdlib-code (long ones). Paths are relative to the config
    file."""
    validation: str | None = None
    """The validation rows, written as for train. Without it, some training rows are set aside (validation_fraction)."""
    output: str = "output"
    """Column of the gold output, or a path like messages.assistant."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Slot name to column, or to a path like messages.user, where the two names differ."""
    only: dict[str, str] = Field(default_factory=dict)
    """Which rows to use: a regular expression for a column or path. A row is left out, in every part, if an expression
    does not match anywhere in its column. So the tasks of a sequence can share one file."""
    limit: RowLimits = Field(default_factory=RowLimits)
    """How many rows of each part are used."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training rows to set aside when there is no validation file. A hash of their values chooses them."""
    duplicates: Policy = "warn"
    """What to do if a part has the same slot values twice; drop keeps the first row."""
    leakage: Policy = "error"
    """What to do if a training row has the slot values of a validation row; drop removes the training row."""
