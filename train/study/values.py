"""The numbers of an evaluation by path, and the same numbers in bootstrap draws of the rows.

A path is ``GROUP/QUANTITY`` (the mean over the group's contexts), ``GROUP/QUANTITY/spread``, ``GROUP/consistency``,
``forgetting/QUANTITY``, ``frozen_prompt/looks_like_task`` or ``no_context/looks_like_task``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvopt.measure.bootstrap import row_draws
from kvopt.train.evaluation.document import Measured
from kvopt.train.evaluation.statistics import Ratios, redrawn


def by_path(evaluation: Mapping[str, Any]) -> dict[str, float | None]:
    """The numbers of ``evaluation.json``."""
    found: dict[str, float | None] = {}
    for group in evaluation["groups"]:
        for quantity, value in group["quantities"].items():
            found[f"{group['group']}/{quantity}"] = value["mean"]
            if len(group["contexts"]) > 1:
                found[f"{group['group']}/{quantity}/spread"] = value["spread"]
        if group["consistency"]:
            found[f"{group['group']}/consistency"] = group["consistency"]["mean"]
    for quantity, value in (evaluation["forgetting"] or {}).items():
        if isinstance(value, Mapping):
            found[f"forgetting/{quantity}"] = value["mean"]
    for probe in ("frozen_prompt", "no_context"):
        if evaluation[probe]:
            found[f"{probe}/looks_like_task"] = evaluation[probe]["looks_like_task"]["mean"]
    return found


def draws_by_path(found: Measured, *, seed: int, resamples: int) -> dict[str, np.ndarray]:
    """What each path is in every draw of rows, [resamples], float64, NaN where a draw has no value; without the paths
    of a single row, which says nothing about other rows.

    Draw i takes the same rows for every model that was evaluated on the same ones.
    """
    of_rows = {
        **{group: [{"consistency": ratio} for ratio in rows] for group, rows in found.consistency.items()},
        "frozen_prompt": found.frozen_by_row,
        "no_context": found.bare,
        "forgetting": found.probes,
    }
    parts: list[tuple[Ratios, Mapping[str, Sequence[str]]]] = [
        (found.answered, found.groups),
        (found.scored, found.groups),
        *(({name: rows}, {name: [name]}) for name, rows in of_rows.items() if rows),
    ]
    draws: dict[str, np.ndarray] = {}
    for ratios, groups in parts:
        examples = len(next(iter(ratios.values())))
        if examples < 2:
            continue
        for group, quantities in redrawn(ratios, groups, row_draws(examples, seed, resamples)).items():
            for quantity, (mean, spread) in quantities.items():
                draws[f"{group}/{quantity}"] = mean
                if len(groups[group]) > 1:
                    draws[f"{group}/{quantity}/spread"] = spread
    return draws
