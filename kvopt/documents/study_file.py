"""``study.json``: arms (ways to train a student) with several seeds each, compared at equal budgets.

Numbers go by a path: ``GROUP/QUANTITY`` (a mean over the group's contexts), ``GROUP/QUANTITY/spread``,
``GROUP/consistency``, ``forgetting/QUANTITY``, ``frozen_prompt/looks_like_task`` or ``no_context/looks_like_task``.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Annotated

from pydantic import Field

from kvopt.documents.evaluation_file import EvaluatedRows
from kvopt.documents.part import CI95, DocumentPart, Estimate, FormatVersion, StandsOn

SHOWN_GROUPS = ("original", "held-out", "templates", "none")
LIKELIHOOD = "gold_nll"
FORGETTING = ("forgetting/kl_from_base", "forgetting/gold_nll_change")


class OverSeeds(Estimate):
    """One number over the seeds of an arm."""

    std: float | None = Field(None, description="standard deviation over seeds; null for one seed")
    seeds: list[float | None] = Field([], description="the value of each seed")
    ci95_bootstrap: CI95 | None = Field(None, description="95 % bootstrap interval over rows and seeds")


class ArmDifference(DocumentPart):
    """One number of an arm against the reference arm."""

    difference: OverSeeds = Field(description="arm − reference, seed by seed")
    p: float | None = Field(
        None, description="of the paired test over rows and seeds, two-sided; null for one seed, and in old files"
    )
    separable: bool | None = Field(
        None,
        description="whether p, corrected for all arms that are compared with the reference by this number (Holm), is"
        " at most 0.05; null for one seed. Old files: whether the intervals over seeds lie apart",
    )


class ArmRun(DocumentPart):
    """One arm with one seed."""

    seed: int | None = Field(None, description="of the student")
    student: str = Field("", description="name of the student that was trained")
    steps: int | None = Field(None, description="optimizer steps")
    tokens: int | None = Field(None, description="tokens through the student")
    gold_tokens: int | None = Field(None, description="tokens that the loss was computed on")
    seconds: float | None = Field(None, description="of training, wall-clock; null where the ledger does not say")
    context_kl: float | None = Field(None, description="mean forward KL of its contexts, nats per gold token")
    context_nll: float | None = Field(None, description="loss under its contexts before training, nats per gold token")
    values: dict[str, float | None] = Field({}, description="by path")


class ArmResult(DocumentPart):
    """One way to train students."""

    name: str = Field(description="of the student that it trains, or curve-N")
    budget: str = Field(description="what is equal to the other arms: steps, tokens, epochs or seconds")
    contexts: list[str] = Field([], description="as in the config")
    mutations: int | None = Field(None, description="its number of mutations, where it is a point of the curve")
    runs: list[ArmRun] = Field([], description="each seed")
    steps: float | None = Field(None, description="mean over seeds")
    tokens: float | None = Field(None, description="mean over seeds")
    seconds: float | None = Field(None, description="mean over seeds")
    values: dict[str, OverSeeds] = Field({}, description="by path")
    against_reference: dict[str, ArmDifference] | None = Field(None, description="by path; null for the reference")


class PowerLaw(DocumentPart):
    """a · (n + 1)^(−b) + c for n mutations."""

    a: float = Field(description="what all mutations together change")
    b: float = Field(description="how fast")
    c: float = Field(description="the value that ever more mutations approach")


class PowerLawIntervals(DocumentPart):
    """95 % bootstrap intervals of a, b and c over seeds."""

    a: CI95 = Field(description="of a")
    b: CI95 = Field(description="of b")
    c: CI95 = Field(description="of c")


Number = Annotated[int, Field(strict=False)]  # a key of JSON is text
Points = Annotated[list[float], Field(min_length=1)]


class CurveFit(DocumentPart):
    """One quantity by number of mutations, and the power law through it."""

    counts: list[int] = Field([], description="numbers of mutations, rising")
    values: dict[Number, Points] = Field(description="by number of mutations, the value of each seed")
    fit: PowerLaw | None = Field(None, description="null: no power law fits")
    ci95: PowerLawIntervals | None = Field(None, description="null for one seed, or where few draws have a fit")
    r2: float | None = Field(None, description="share of the variance that the fit explains")
    p: float | None = Field(None, description="of an F test of the fit against a flat curve")
    converged: float | None = Field(None, description="share of bootstrap draws whose fit converged")


class ExplainedVariance(DocumentPart):
    """How far one number explains another, by least squares."""

    points: int = Field(description="students or arms that have both numbers")
    slope: float | None = Field(None, description="of the line")
    intercept: float | None = Field(None, description="of the line")
    r2: float = Field(description="share of the variance that is explained")
    p: float = Field(description="of the slope against 0")


class StudyDocument(DocumentPart):
    """``study.json``: arms (ways to train a student) with several seeds each, compared at equal budgets."""

    format_version: FormatVersion = 1
    name: str = Field(description="of the run")
    base: str | None = Field(None, description="the base's name")
    rows: EvaluatedRows = EvaluatedRows()
    seeds: list[int] = Field(description="each arm is trained once with each")
    budget: str | None = Field(None, description="what is equal in all arms: steps, tokens or epochs")
    reference: str = Field(description="name of the arm that others are compared with")
    complete: bool = Field(description="whether every arm was trained with every seed")
    headlines: list[str] = Field(description="one quantity for each metric")
    interval: str = Field("", description="what ci95 is, in words")
    bootstrap: str = Field("", description="what ci95_bootstrap is, in words")
    base_values: dict[str, float | None] = Field({}, description="of the base, by path")
    arms: list[ArmResult] = Field(description="in the order in which they are trained")
    curve: dict[str, CurveFit] | None = Field(None, description="by path; null without a curve")
    sweep: dict[str, ExplainedVariance | None] = Field(
        {}, description="what explains forgetting over all students; null for too few points"
    )
    stands_on: StandsOn | None = Field(None, description="what it was measured on; absent in old files")


def compared_paths(headlines: Sequence[str], known: Container[str]) -> list[str]:
    """Paths into ``values``: the few quantities in which arms are shown against the reference arm."""
    wanted = [f"{group}/{headlines[0]}" for group in ("original", "templates")] if headlines else []
    wanted += [f"{group}/{LIKELIHOOD}" for group in ("original", "templates", "none")] + [FORGETTING[0]]
    return [path for path in wanted if path in known]
