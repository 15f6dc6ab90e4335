"""The paths of a study (``GROUP/QUANTITY``) in words, and what the study says, as sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvopt.documents.study_file import FORGETTING, LIKELIHOOD, ArmResult, OverSeeds, StudyDocument
from kvopt.report.choice import DUST, shown_interval, signed

GROUP_WORDS = {
    "original": "under the original template",
    "held-out": "under mutations held out of training",
    "templates": "under other wordings",
    "wordings": "over all wordings",
    "none": "without a context",
    "learned": "under learned contexts",
    "other": "under other contexts",
}
QUANTITY_WORDS = {
    LIKELIHOOD: "loss",
    "kl_from_base": "KL from the base",
    "top1_agreement": "same top token as the base",
    "answer_cut": "answers that were cut",
}
WHOLE_PATHS = {
    "forgetting/kl_from_base": "forgetting",
    "forgetting/gold_nll_change": "forgetting, as change of loss",
    "no_context/looks_like_task": "does the task unasked",
    "frozen_prompt/looks_like_task": "does the task when asked for another",
    "wordings/consistency": "same answer under all wordings",
    "learned/consistency": "same answer under all learned contexts",
}
MOST = 6  # arms that a verdict names
LOSS_FIRST = tuple(f"{group}/{LIKELIHOOD}" for group in ("templates", "held-out", "original", "none"))
"""What a verdict compares: the first of these that was measured."""


def path_words(path: str) -> str:
    """``templates/gold_nll`` as "loss under other wordings"."""
    if path in WHOLE_PATHS:
        return WHOLE_PATHS[path]
    group, _, rest = path.partition("/")
    quantity, _, spread = rest.partition("/")
    words = QUANTITY_WORDS.get(quantity, quantity.replace("_", " "))
    if spread:
        over = "wordings" if group == "wordings" else GROUP_WORDS.get(group, group)
        return f"spread of {words} over {over}" if group == "wordings" else f"spread of {words} {over}"
    return f"{words} {GROUP_WORDS.get(group, group)}"


def lower_is_better(path: str) -> bool | None:
    """Whether a lower value is the better one; None for a metric's value, whose sense only its author knows."""
    if path.startswith("forgetting/") or path.endswith("/spread") or f"/{LIKELIHOOD}" in path:
        return True
    return False if path.endswith("/consistency") else None


def interval_of(value: OverSeeds) -> tuple[float, float] | None:
    """The interval over rows and seeds, else the one over seeds; None where there is none that says something."""
    return shown_interval(value.ci95_bootstrap or value.ci95)


def verdict(study: StudyDocument) -> list[str]:
    """What the study says: the best arm against the reference arm first, then the other arms."""
    arms = [arm for arm in study.arms if arm.against_reference]
    if not arms:
        return _alone(study)
    path = next((p for p in LOSS_FIRST if any(_difference(arm, p) for arm in arms)), None)
    if path is None:
        headline = study.headlines[0] if study.headlines else ""
        wanted = [f"{group}/{headline}" for group in ("templates", "held-out", "original", "none")]
        path = next((p for p in wanted if any(_difference(arm, p) for arm in arms)), None)
    sign = 1 if path is not None and lower_is_better(path) else -1

    def place(arm: ArmResult) -> float:
        found = _difference(arm, path) if path else None
        return sign * found.mean if found is not None and found.mean is not None else float("inf")

    lines = [_against(study, arm, path) for arm in sorted(arms, key=place)]
    more = len(lines) - MOST
    return lines if more <= 0 else [*lines[:MOST], f"{more} more {'arm' if more == 1 else 'arms'}: see the details."]


def _difference(arm: ArmResult, path: str) -> OverSeeds | None:
    against = (arm.against_reference or {}).get(path)
    return against.difference if against and against.difference.mean is not None else None


def _against(study: StudyDocument, arm: ArmResult, path: str | None) -> str:
    parts, forgotten = [], next((p for p in FORGETTING if _difference(arm, p)), None)
    for one in (path, forgotten):
        value = _difference(arm, one) if one else None
        if one is not None and value is not None:
            parts.append(f"{path_words(one)} {_number_and_meaning(one, value)}")
    if not parts:
        return f"{arm.name} against {study.reference}: nothing was measured for both."
    return f"{arm.name} against {study.reference}: {'; '.join(parts)}."


def differs(value: OverSeeds) -> bool:
    """Whether there is any difference to speak of, or an interval around none."""
    return interval_of(value) is not None or abs(value.mean or 0.0) > DUST


def _number_and_meaning(path: str, value: OverSeeds) -> str:
    """``−0.130 [−0.200, −0.050] (better)``: what sign and interval say."""
    interval, mean = interval_of(value), value.mean or 0.0
    if not differs(value):
        return "without a difference"
    largest = max(abs(number) for number in (mean, *(interval or ())))
    digits = min(max(2, 1 - math.floor(math.log10(largest))), 6)
    if interval is None:
        return f"{signed(mean, digits)} (no interval)"
    words = f"{signed(mean, digits)} [{signed(interval[0], digits)}, {signed(interval[1], digits)}]"
    if interval[0] <= 0 <= interval[1]:
        return f"{words} (cannot be told from no difference)"
    lower = lower_is_better(path)
    return words if lower is None else f"{words} ({'better' if (mean < 0) == lower else 'worse'})"


def _alone(study: StudyDocument) -> list[str]:
    """Of a study with nothing to compare: each arm against the base."""
    lines = ["There is one way of training only, so nothing is compared."] if len(study.arms) == 1 else []
    for arm in study.arms:
        path = next((p for p in (*LOSS_FIRST, *arm.values) if _known(study, arm, p)), None)
        if path is None:
            continue
        before, after = study.base_values[path], arm.values[path].mean
        lines.append(f"{arm.name}: {path_words(path)} went from {before:.3f} (the base) to {after:.3f}.")
    return lines


def _known(study: StudyDocument, arm: ArmResult, path: str) -> bool:
    value = arm.values.get(path)
    return study.base_values.get(path) is not None and value is not None and value.mean is not None


def steadiness_path(study: StudyDocument) -> str | None:
    """The path of how much a student's results vary with the wording: lower is steadier."""
    wanted = [f"wordings/{name}/spread" for name in (LIKELIHOOD, *study.headlines)]
    return next((path for path in wanted if _known_arms(study, path) > 1), None)


def _known_arms(study: StudyDocument, path: str) -> int:
    return sum(1 for arm in study.arms if (value := arm.values.get(path)) and value.mean is not None)


def words_of_explained(name: str) -> str:
    """``task_kl_to_probe_kl``, CAUSE_to_EFFECT, in words."""
    words = {
        "task_kl": "KL from the base on the task",
        "context_kl": "KL of the contexts in training",
        "context_nll": "loss under the contexts in training",
        "probe_kl": "forgetting",
        "probe_nll_change": "forgetting, as change of loss",
    }
    cause, _, effect = name.partition("_to_")
    return f"{words.get(effect, effect.replace('_', ' '))} by {words.get(cause, cause.replace('_', ' '))}"


def measured_somewhere(study: StudyDocument, paths: Sequence[str]) -> list[str]:
    """Those paths that some arm or the base has a number for."""
    return [path for path in paths if _known_arms(study, path) or study.base_values.get(path) is not None]
