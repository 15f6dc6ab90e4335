"""Schedules: which row meets which context at which position of the training stream.

Positions count items from the start of training, step after step; everything is a function of (seed, position), so a
resumed run meets what an uninterrupted one meets, and several processes share one stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvopt.train.schedules.expand import Expand
from kvopt.train.schedules.order import Schedule
from kvopt.train.schedules.resample import Resample
from kvopt.train.schedules.state_adaptive import StateAdaptive

__all__ = ["Expand", "Resample", "Schedule", "StateAdaptive", "build_schedule"]

SCHEDULES: dict[str, Any] = {"expand": Expand, "resample": Resample, "state-adaptive": StateAdaptive}


def build_schedule(config: Any, rows: int, weights: Sequence[float], seed: int) -> Schedule:
    """The schedule of a ``schedule:`` section over ``rows`` rows and contexts with these weights."""
    options = config.model_dump(exclude={"kind", "rows"})
    if config.kind == "state-adaptive":
        options["scored_rows"] = config.rows
    return SCHEDULES[config.kind](rows=rows, weights=tuple(weights), seed=seed, **options)
