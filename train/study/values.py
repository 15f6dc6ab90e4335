"""The numbers of an evaluation by path, and the same numbers in bootstrap draws of the rows.

A path is ``GROUP/QUANTITY`` (the mean over the group's contexts), ``GROUP/QUANTITY/spread``, ``GROUP/consistency``,
``forgetting/QUANTITY``, ``frozen_prompt/looks_like_task`` or ``no_context/looks_like_task``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kvopt.train.evaluation.document import Measured
from kvopt.train.evaluation.metrics import Ratio
from kvopt.train.evaluation.statistics import redrawn, row_draws


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
    """What each path is in every draw of rows, [resamples], float64, NaN where a draw has no value.

    Draw i takes the same rows for every model that was evaluated on the same ones.
    """
    draws: dict[str, np.ndarray] = {}
    for ratios in (found.answered, found.scored):
        examples = len(next(iter(ratios.values())))
        for group, quantities in redrawn(ratios, found.groups, row_draws(examples, seed, resamples)).items():
            for quantity, (mean, spread) in quantities.items():
                draws[f"{group}/{quantity}"] = mean
                draws[f"{group}/{quantity}/spread"] = spread

    def of_rows(rows: Sequence[Mapping[str, Ratio]]) -> dict[str, np.ndarray]:
        quantities = redrawn({"": rows}, {"": [""]}, row_draws(len(rows), seed, resamples))[""]
        return {quantity: mean for quantity, (mean, _) in quantities.items()}

    for group, agreeing in found.consistency.items():
        draws[f"{group}/consistency"] = of_rows([{"": row} for row in agreeing])[""]
    for name, rows in (
        ("frozen_prompt", found.frozen_by_row),
        ("no_context", found.bare),
        ("forgetting", found.probes),
    ):
        draws |= {f"{name}/{quantity}": values for quantity, values in of_rows(rows).items()} if rows else {}
    return draws
