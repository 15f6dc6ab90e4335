"""``study.json`` from the evaluations of a study's students; its entries: :mod:`kvopt.documents.study_file`.

What paths are: :mod:`kvopt.train.study.values`; what intervals are: :mod:`kvopt.train.study.seeds`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvopt.config.document import Config
from kvopt.documents.evaluation_file import EvaluationDocument
from kvopt.documents.student_record import StudentRecord
from kvopt.documents.study_file import (
    LIKELIHOOD,
    ArmDifference,
    ArmResult,
    ArmRun,
    CurveFit,
    ExplainedVariance,
    StudyDocument,
)
from kvopt.errors import InputError
from kvopt.measure.paired import LEVEL, holm
from kvopt.train.arms import EQUAL_SECONDS, Arm, settings_of
from kvopt.train.study.curve import explained, fit_curve
from kvopt.train.study.seeds import compared, over_rows_and_seeds, over_seeds
from kvopt.train.study.values import by_path

FORMAT_VERSION = 1
INTERVAL = "95 % Student t over seeds; what is separable is decided by a paired test over rows and seeds, with Holm"
BOOTSTRAP = "95 % percentile bootstrap over rows and seeds (of one seed: over rows), the same rows for all arms"
CURVE_GROUPS = ("original", "held-out", "templates")


@dataclass(frozen=True)
class Result:
    """One arm with one seed: what was trained, how long it took, how it was evaluated (with its values by path in
    bootstrap draws of rows, each [resamples]), what it was trained under.
    """

    arm: Arm
    seed: int
    record: StudentRecord
    seconds: float | None
    evaluation: EvaluationDocument
    context_kl: float
    context_nll: float
    draws: Mapping[str, np.ndarray] = field(default_factory=dict)


def build_document(
    config: Config,
    arms: Sequence[Arm],
    reference: str,
    base: EvaluationDocument,
    results: Sequence[Result],
    complete: bool,
) -> StudyDocument:
    """The document of the results so far; ``base`` is the base's evaluation."""
    study = settings_of(config)
    trained = [(arm, of_arm) for arm in arms if (of_arm := [r for r in results if r.arm is arm])]
    rows = [_arm(arm, of_arm, config.seed) for arm, of_arm in trained]
    first = next((i for i, (a, _) in enumerate(trained) if a.name == reference and a.budget != EQUAL_SECONDS), None)
    for i, (row, (_, of_arm)) in enumerate(zip(rows, trained, strict=True)):
        if first is not None and i != first:
            pairs = list(zip(of_arm, trained[first][1], strict=False))  # in an unfinished study seeds may be missing
            row.against_reference = _against(row, rows[first], pairs, config.seed)
    _correct(rows)
    return StudyDocument(
        format_version=FORMAT_VERSION,
        name=config.name,
        base=base.base,
        rows=base.rows,
        seeds=study.seeds,
        budget=study.budget,
        reference=reference,
        complete=complete,
        headlines=base.headlines,
        interval=INTERVAL,
        bootstrap=BOOTSTRAP,
        base_values=by_path(base),
        arms=rows,
        curve=_curves(config, rows, base.headlines[0]),
        sweep=sweep(rows),
        stands_on=base.stands_on,
    )


def check_quantities(config: Config, base: EvaluationDocument) -> None:
    """Refuse quantities of the curve that no evaluation has; ``base`` is the base's. Raises InputError."""
    curve, known = settings_of(config).curve, by_path(base)
    for path in (curve and curve.quantities) or ():
        if path not in known:
            close = difflib.get_close_matches(path, known, n=1)
            fix = f"did you mean {close[0]!r}?" if close else f"write GROUP/QUANTITY, such as {next(iter(known))}"
            raise InputError(f"nothing is measured as {path!r}", where="study.curve.quantities", fix=fix)


def _arm(arm: Arm, results: Sequence[Result], seed: int) -> ArmResult:
    runs = [
        ArmRun(
            seed=r.seed,
            student=str(r.record.name),
            steps=r.record.steps,
            tokens=r.record.tokens,
            gold_tokens=r.record.gold_tokens,
            seconds=r.seconds,
            context_kl=r.context_kl,
            context_nll=r.context_nll,
            values=by_path(r.evaluation),
        )
        for r in results
    ]
    intervals = over_rows_and_seeds([r.draws for r in results], seed=seed)
    values = {path: over_seeds([run.values.get(path) for run in runs]) for path in (runs[0].values if runs else ())}
    for path, value in values.items():
        value.ci95_bootstrap = intervals.get(path)
    return ArmResult(
        name=arm.name,
        budget=arm.budget,
        contexts=[_spelled(choice) for choice in arm.config.contexts],
        mutations=arm.mutations,
        runs=runs,
        steps=over_seeds([run.steps for run in runs]).mean,
        tokens=over_seeds([run.tokens for run in runs]).mean,
        seconds=over_seeds([run.seconds for run in runs]).mean,
        values=values,
        against_reference=None,
    )


def _spelled(choice: Any) -> str:
    return choice.context if choice.weight == 1 else f"{choice.context} × {choice.weight:g}"


def _against(
    row: ArmResult, reference: ArmResult, pairs: Sequence[tuple[Result, Result]], seed: int
) -> dict[str, ArmDifference]:
    differences = [{path: a.draws[path] - b.draws[path] for path in a.draws if path in b.draws} for a, b in pairs]
    intervals = over_rows_and_seeds(differences, seed=seed)
    against = {}
    for path in (path for path in row.values if path in reference.values):
        known = intervals.get(path) is not None
        draws = [one[path] for one in differences] if known else None
        drawn = _rows_behind(path, pairs[0][0].evaluation) if pairs else 0
        against[path] = compared(row.values[path], reference.values[path], draws, drawn)
        against[path].difference.ci95_bootstrap = intervals.get(path)
    return against


def _rows_behind(path: str, evaluation: EvaluationDocument) -> int:
    """How many rows a number is the mean over."""
    group, _, quantity = path.partition("/")
    if group == "forgetting":
        return evaluation.forgetting.rows if evaluation.forgetting else 0
    if group == "frozen_prompt":
        return evaluation.frozen_prompt.rows if evaluation.frozen_prompt else 0
    likelihood = quantity.split("/")[0] in (LIKELIHOOD, "kl_from_base", "top1_agreement")
    return evaluation.rows.scored if likelihood else evaluation.rows.answered


def _correct(rows: Sequence[ArmResult]) -> None:
    """What is separable, corrected for the number of arms: the family is all arms by one number."""
    compared_rows = [row.against_reference for row in rows if row.against_reference]
    for path in dict.fromkeys(path for against in compared_rows for path in against):
        family = [against[path] for against in compared_rows if path in against]
        for one, p in zip(family, holm([one.p for one in family]), strict=True):
            one.separable = None if p is None else p <= LEVEL


def _curves(config: Config, rows: Sequence[ArmResult], headline: str) -> dict[str, CurveFit] | None:
    """A fit for each quantity over the arms of the curve that are there; None without a curve."""
    study = settings_of(config)
    points = {row.mutations: row for row in rows if row.mutations is not None}
    if study.curve is None or len(points) < 2:
        return None
    named = [f"{group}/{quantity}" for quantity in (headline, LIKELIHOOD) for group in CURVE_GROUPS]
    paths = study.curve.quantities or named
    seeds = min(len(row.runs) for row in points.values())
    fits = {}
    for path in paths:
        values = {n: [run.values.get(path) for run in row.runs[:seeds]] for n, row in points.items()}
        if all(value is not None for of_n in values.values() for value in of_n):
            fits[path] = fit_curve(values, seed=config.seed)  # type: ignore[arg-type]
    return fits or None


def sweep(rows: Sequence[ArmResult]) -> dict[str, ExplainedVariance | None]:
    """R² over the students of a study.

    ``task_kl_to_*``: what KL(base ‖ student) on the task (under the original) says about forgetting on the probes
    (KL(base ‖ student), gold-NLL change), one point for each student. ``context_*_to_*``: the same for the mean
    forward KL, and the loss before any update, of the contexts that an arm is trained under, one point for each arm
    (means over seeds).
    """
    runs = [run for row in rows for run in row.runs]
    explanations = {}
    for short, path in (("probe_kl", "forgetting/kl_from_base"), ("probe_nll_change", "forgetting/gold_nll_change")):
        explanations[f"task_kl_to_{short}"] = explained(
            [run.values.get("original/kl_from_base") for run in runs], [run.values.get(path) for run in runs]
        )
        forgotten = [value.mean if (value := row.values.get(path)) else None for row in rows]
        for name in ("context_kl", "context_nll"):
            means = [over_seeds([getattr(run, name) for run in row.runs]).mean for row in rows]
            explanations[f"{name}_to_{short}"] = explained(means, forgotten)
    return explanations
