"""The document of an evaluation, from the stored rows (its entries: :mod:`kvopt.train.evaluation.evaluate`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvopt.files import file_name
from kvopt.train.evaluation.conditions import GROUPS, WORDINGS, Condition
from kvopt.train.evaluation.frozen import is_container, task_likeness
from kvopt.train.evaluation.metrics import Metric, Ratio, Verdict
from kvopt.train.evaluation.models import BASE, Subject
from kvopt.train.evaluation.statistics import agreement, ratio_of, summarize

if TYPE_CHECKING:
    from kvopt.train.evaluation.evaluate import Evaluation

FORMAT_VERSION = 1
Rows = Sequence[Mapping[str, Any]]


def build_document(
    evaluation: Evaluation,
    model: Subject,
    rows: Mapping[str, Rows],
    verdicts: Mapping[str, Mapping[str, list[Verdict]]],
    *,
    frozen: list[list[str]] | None,
    probes: Rows | None,
    base_probes: Rows | None,
) -> dict[str, Any]:
    """The document of one model.

    Args:
        rows: the stored rows by context.
        verdicts: by context and metric, of the answered rows.
        frozen: answers under instructions that ask for something else, [instruction][row].
        probes, base_probes: likelihoods of the probe rows under the model and the base.
    """
    run, settings = evaluation.run, evaluation.settings
    draws = {"seed": run.config.seed, "resamples": settings.resamples}
    groups = _groups(evaluation.conditions)
    answered = {name: _answered(rows[name], found) for name, found in verdicts.items()}
    scored = {name: [_scored(row) for row in found] for name, found in rows.items()}
    of_answers, answers_of_groups = summarize(answered, groups, **draws)
    of_scores, scores_of_groups = summarize(scored, groups, **draws)
    answered_count = len(evaluation.answered)
    return {
        "format_version": FORMAT_VERSION,
        "name": model.name,
        "base": run.base.name,
        "dtype": str(run.base.dtype).removeprefix("torch."),
        "student": {k: v for k, v in (model.record or {}).items() if k != "history"} if model.name != BASE else None,
        "rows": {"answered": answered_count, "scored": len(evaluation.scored)},
        "headlines": [_headline(metric, of_answers) for metric in evaluation.metrics],
        "quantities": list(dict.fromkeys(q for by in (of_answers, of_scores) for found in by.values() for q in found)),
        "contexts": [
            {
                "name": condition.name,
                "group": condition.group,
                "kind": condition.context.kind,
                "tokens": condition.context.tokens,
                "answers": f"evaluation/{file_name(condition.name)}.jsonl",
                "quantities": of_answers[condition.name] | of_scores[condition.name],
            }
            for condition in evaluation.conditions
        ],
        "groups": [
            {
                "group": group,
                "contexts": members,
                "quantities": answers_of_groups[group] | scores_of_groups[group],
                "consistency": _consistency([rows[name][:answered_count] for name in members], draws),
            }
            for group, members in groups.items()
        ],
        "no_context": _no_context(evaluation.conditions, rows, answered_count, draws),
        "frozen_prompt": _frozen(evaluation, rows, frozen, draws) if frozen is not None else None,
        "forgetting": _forgetting(evaluation, probes, base_probes, draws) if probes and base_probes else None,
    }


def _groups(conditions: Sequence[Condition]) -> dict[str, list[str]]:
    """Names of the contexts of each group that has any, and those of all groups that state the task in words."""
    groups = {group: [c.name for c in conditions if c.group == group] for group in GROUPS}
    groups["wordings"] = [c.name for c in conditions if c.group in WORDINGS]
    return {group: members for group, members in groups.items() if members}


def _answered(rows: Rows, verdicts: Mapping[str, list[Verdict]]) -> list[dict[str, Ratio]]:
    """The ratios of every metric, and whether the answer was cut, of each answered row."""
    count = len(next(iter(verdicts.values())))
    return [
        {q: r for found in verdicts.values() for q, r in found[i].ratios.items()}
        | {"answer_cut": (float(rows[i]["cut"]), 1.0)}
        for i in range(count)
    ]


def _scored(row: Mapping[str, Any]) -> dict[str, Ratio]:
    tokens = float(row["gold_tokens"])
    return {
        "gold_nll": (row["nll"], tokens),
        "kl_from_base": (row["kl"], tokens),
        "top1_agreement": (float(row["agree"]), tokens),
    }


def _headline(metric: Metric, by_context: Mapping[str, Mapping[str, Any]]) -> str:
    known = next(iter(by_context.values()))
    if metric.headline in known:
        return metric.headline
    return next(q for q in known if q.startswith(f"{metric.name}."))


def _consistency(rows: Sequence[Rows], draws: dict[str, int]) -> dict[str, Any] | None:
    if len(rows) < 2:
        return None
    return ratio_of(agreement([[row["answer"] for row in found] for found in rows]), **draws)


def _is_json_task(rows: Rows) -> bool:
    return all(is_container(row["gold"]) for row in rows)


def _shares(likeness: Sequence[dict[str, Ratio]], draws: dict[str, int]) -> dict[str, Any]:
    """``{mean, ci95}`` of each share; None for one that does not apply."""
    shares = {q: ratio_of([one[q] for one in likeness], **draws) for q in likeness[0]}
    return {q: share if share["mean"] is not None else None for q, share in shares.items()}


def _no_context(
    conditions: Sequence[Condition], rows: Mapping[str, Rows], count: int, draws: dict[str, int]
) -> dict[str, Any] | None:
    """How far answers without any context still are those of the task."""
    names = {condition.group: condition.name for condition in conditions}
    if not {"original", "none"} <= names.keys():
        return None
    original, bare = rows[names["original"]][:count], rows[names["none"]][:count]
    json_task = _is_json_task(original)
    pairs = zip(bare, original, strict=True)
    return _shares([task_likeness(b["answer"], o["answer"], json_task=json_task) for b, o in pairs], draws)


def _frozen(
    evaluation: Evaluation, rows: Mapping[str, Rows], answers: list[list[str]], draws: dict[str, int]
) -> dict[str, Any]:
    assert evaluation.settings.frozen is not None
    count = len(answers[0])
    original = rows["original"][:count]
    json_task = _is_json_task(original)
    likeness = [
        [task_likeness(a, row["answer"], json_task=json_task) for a, row in zip(found, original, strict=True)]
        for found in answers
    ]
    by_row = [_sum([found[i] for found in likeness]) for i in range(count)]  # a row's answers hang together
    instructions = [
        {"instruction": instruction}
        | {q: share["mean"] if share else None for q, share in _shares(found, draws).items()}
        for instruction, found in zip(evaluation.settings.frozen.instructions, likeness, strict=True)
    ]
    return {"rows": count, **_shares(by_row, draws), "instructions": instructions}


def _sum(likeness: Sequence[dict[str, Ratio]]) -> dict[str, Ratio]:
    return {q: (sum(one[q][0] for one in likeness), sum(one[q][1] for one in likeness)) for q in likeness[0]}


def _forgetting(evaluation: Evaluation, rows: Rows, base_rows: Rows, draws: dict[str, int]) -> dict[str, Any]:
    assert evaluation.probes is not None
    paired = [
        _scored(row)
        | {
            "base_gold_nll": (base["nll"], float(base["gold_tokens"])),
            "gold_nll_change": (row["nll"] - base["nll"], float(row["gold_tokens"])),
        }
        for row, base in zip(rows, base_rows, strict=True)
    ]
    found, _ = summarize({"": paired}, {}, **draws)
    return {
        "rows": len(rows),
        "too_long": evaluation.probes.too_long,
        "gold_tokens": sum(row["gold_tokens"] for row in rows),
        **found[""],
    }
