"""The numbers of an evaluation by path, and the same numbers in bootstrap draws of the rows.

A path is ``GROUP/QUANTITY`` (the mean over the group's contexts), ``GROUP/QUANTITY/spread``, ``GROUP/consistency``,
``forgetting/QUANTITY``, ``frozen_prompt/looks_like_task`` or ``no_context/looks_like_task``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kvopt.documents.evaluation_file import EvaluationDocument
from kvopt.measure.bootstrap import row_draws
from kvopt.measure.ratios import Ratios, redrawn
from kvopt.train.evaluation.results import Measured


def by_path(evaluation: EvaluationDocument) -> dict[str, float | None]:
    """The numbers of ``evaluation.json``."""
    numbers: dict[str, float | None] = {}
    for group in evaluation.groups:
        for quantity, value in group.quantities.items():
            numbers[f"{group.group}/{quantity}"] = value.mean
            if len(group.contexts) > 1:
                numbers[f"{group.group}/{quantity}/spread"] = value.spread
        if group.consistency:
            numbers[f"{group.group}/consistency"] = group.consistency.mean
    if evaluation.forgetting:
        for quantity, estimate in evaluation.forgetting.quantities.items():
            numbers[f"forgetting/{quantity}"] = estimate.mean
    for probe, shares in (("frozen_prompt", evaluation.frozen_prompt), ("no_context", evaluation.no_context)):
        if shares is not None and shares.looks_like_task is not None:
            numbers[f"{probe}/looks_like_task"] = shares.looks_like_task.mean
    return numbers


def draws_by_path(measured: Measured, *, seed: int, resamples: int) -> dict[str, np.ndarray]:
    """What each path is in every draw of rows, [resamples], float64, NaN where a draw has no value; without the paths
    of a single row, which says nothing about other rows.

    Draw i takes the same rows for every model that was evaluated on the same ones.
    """
    of_rows = {
        **{group: [{"consistency": ratio} for ratio in rows] for group, rows in measured.consistency.items()},
        "frozen_prompt": measured.frozen_by_row,
        "no_context": measured.bare,
        "forgetting": measured.probes,
    }
    parts: list[tuple[Ratios, Mapping[str, Sequence[str]]]] = [
        (measured.answered, measured.groups),
        (measured.scored, measured.groups),
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
