"""The document of an evaluation, from the stored rows (its entries: :mod:`kvopt.train.evaluation.evaluate`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvopt.config.metrics import Ratio, Verdict
from kvopt.documents.evaluation_file import (
    WORDINGS,
    ConditionResult,
    EvaluatedRows,
    EvaluationDocument,
    Forgetting,
    FrozenHabits,
    FrozenInstruction,
    GroupResult,
    HabitShares,
)
from kvopt.documents.part import Estimate
from kvopt.documents.student_record import StudentRecord
from kvopt.measure.ratios import Ratios, near_best, ratio_of, retention, summarize
from kvopt.storage.files import file_name
from kvopt.train.evaluation.conditions import GROUPS, Condition
from kvopt.train.evaluation.evaluation_plan import EvaluationPlan
from kvopt.train.evaluation.frozen import is_container, task_likeness
from kvopt.train.evaluation.models import BASE, Subject
from kvopt.train.evaluation.sensitivity import posix
from kvopt.train.json_answers import agreement

FORMAT_VERSION = 1
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Measured:
    """What a model's stored rows say, as a ratio for each row and quantity, before any mean is taken.

    ``answered`` and ``scored`` go by context, ``consistency`` and ``posix`` by group (of those with two contexts or
    more; ``posix`` where they are wordings), and
    ``frozen`` by instruction; ``bare`` is how far answers without any context are those of the task. None is what was
    not asked for.
    """

    groups: Mapping[str, Sequence[str]]
    answered: Ratios
    scored: Ratios
    consistency: Mapping[str, Sequence[Ratio]]
    bare: Sequence[Mapping[str, Ratio]] | None
    frozen: Sequence[Sequence[Mapping[str, Ratio]]] | None
    probes: Sequence[Mapping[str, Ratio]] | None
    posix: Mapping[str, Sequence[Ratio]] = field(default_factory=dict)

    @property
    def frozen_by_row(self) -> list[dict[str, Ratio]] | None:
        """The instructions' ratios added up: a row's answers hang together."""
        return None if self.frozen is None else [_sum(row) for row in zip(*self.frozen, strict=True)]


def measured(
    conditions: Sequence[Condition],
    rows: Mapping[str, Rows],
    verdicts: Mapping[str, Mapping[str, list[Verdict]]],
    *,
    frozen: list[list[str]] | None,
    probes: Rows | None,
    base_probes: Rows | None,
    moved: Sequence[dict[str, Any]] | None = None,
) -> Measured:
    """What the rows of one model say.

    Args:
        rows: the stored rows by context.
        verdicts: by context and metric, of the answered rows.
        frozen: answers under instructions that ask for something else, [instruction][row].
        probes, base_probes: likelihoods of the probe rows under the model and the base.
        moved: log probabilities of answers under other wordings.
    """
    groups = _groups(conditions)
    answered = {name: _answered(rows[name], of_metrics) for name, of_metrics in verdicts.items()}
    count = len(next(iter(answered.values())))
    return Measured(
        groups,
        answered,
        {name: [_scored(row) for row in scores] for name, scores in rows.items()},
        {
            group: agreement([[row["answer"] for row in rows[name][:count]] for name in members])
            for group, members in groups.items()
            if len(members) > 1
        },
        _bare(conditions, rows, count),
        [_likeness(instruction, rows["original"]) for instruction in frozen] if frozen is not None else None,
        [_probed(row, base) for row, base in zip(probes, base_probes, strict=True)] if probes and base_probes else None,
        {
            group: posix(moved, members)
            for group, members in groups.items()
            if len(members) > 1 and group in (*WORDINGS, "wordings")
        }
        if moved
        else {},
    )


def build_document(evaluation: EvaluationPlan, model: Subject, measured: Measured) -> EvaluationDocument:
    """The document of one model."""
    task, settings = evaluation.task, evaluation.settings
    draws = {"seed": task.config.seed, "resamples": settings.resamples}
    of_answers, answers_of_groups = summarize(measured.answered, measured.groups, **draws)
    of_scores, scores_of_groups = summarize(measured.scored, measured.groups, **draws)
    headlines = [metric.headline_among(list(next(iter(of_answers.values())))) for metric in evaluation.metrics]
    retained, retained_by_groups = _retained(measured, headlines, draws)
    for group, members in measured.groups.items():
        for headline, kept in retained_by_groups.get(group, {}).items():
            quantity = answers_of_groups[group][headline]
            quantity.near_best = near_best([of_answers[name][headline].mean for name in members])
            quantity.retention = kept
    return EvaluationDocument(
        format_version=FORMAT_VERSION,
        name=model.name,
        base=task.base.name,
        dtype=str(task.base.dtype).removeprefix("torch."),
        student=_without_history(model.record) if model.name != BASE else None,
        rows=EvaluatedRows(answered=len(evaluation.answered), scored=len(evaluation.scored)),
        headlines=headlines,
        quantities=list(dict.fromkeys(q for by in (of_answers, of_scores) for one in by.values() for q in one)),
        contexts=[
            ConditionResult(
                name=condition.name,
                group=condition.group,
                kind=condition.context.kind,
                tokens=condition.context.tokens,
                answers=f"evaluation/{file_name(condition.name)}.jsonl",
                quantities=of_answers[condition.name] | of_scores[condition.name],
                **({"retention": retained[condition.name]} if retained else {}),
            )
            for condition in evaluation.conditions
        ],
        groups=[
            GroupResult(
                group=group,
                contexts=list(members),
                quantities=answers_of_groups[group] | scores_of_groups[group],
                consistency=ratio_of(measured.consistency[group], **draws) if group in measured.consistency else None,
                **({"posix": ratio_of(measured.posix[group], **draws)} if group in measured.posix else {}),
            )
            for group, members in measured.groups.items()
        ],
        no_context=HabitShares(**_shares(measured.bare, draws)) if measured.bare is not None else None,
        frozen_prompt=_frozen_document(evaluation, measured, draws),
        forgetting=_forgetting_document(evaluation, measured, draws),
        stands_on=task.stands_on,
    )


def _retained(
    measured: Measured, headlines: Sequence[str], draws: dict[str, int]
) -> tuple[dict[str, dict[str, Estimate]], dict[str, dict[str, Estimate]]]:
    """What contexts and groups keep of the headlines under the original template; nothing where that was not asked."""
    if "original" not in measured.answered:
        return {}, {}
    ratios = {
        name: [{headline: row[headline] for headline in headlines} for row in rows]
        for name, rows in measured.answered.items()
    }
    return retention(ratios, measured.groups, "original", **draws)


def _without_history(record: StudentRecord | None) -> StudentRecord:
    """What a student's folder says of it; nothing for an adapter of another tool."""
    known = record.given() if record else {}
    return StudentRecord(**{name: value for name, value in known.items() if name not in ("history", "held_out")})


def _groups(conditions: Sequence[Condition]) -> dict[str, list[str]]:
    """Names of the contexts of each group that has any, and those of all groups that state the task in words."""
    groups = {group: [c.name for c in conditions if c.group == group] for group in GROUPS}
    groups["wordings"] = [c.name for c in conditions if c.group in WORDINGS]
    return {group: members for group, members in groups.items() if members}


def _answered(rows: Rows, verdicts: Mapping[str, list[Verdict]]) -> list[dict[str, Ratio]]:
    """The ratios of every metric, and whether the answer was cut, of each answered row."""
    count = len(next(iter(verdicts.values())))
    return [
        {q: r for verdicts_of_metric in verdicts.values() for q, r in verdicts_of_metric[i].ratios.items()}
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


def _is_json_task(rows: Rows) -> bool:
    return all(is_container(row["gold"]) for row in rows)


def _shares(likeness: Sequence[Mapping[str, Ratio]], draws: dict[str, int]) -> dict[str, Estimate | None]:
    """Each share by its name; None for one that does not apply."""
    shares = {q: ratio_of([one[q] for one in likeness], **draws) for q in likeness[0]}
    return {q: share if share.mean is not None else None for q, share in shares.items()}


def _bare(conditions: Sequence[Condition], rows: Mapping[str, Rows], count: int) -> list[dict[str, Ratio]] | None:
    """How far answers without any context still are those of the task."""
    names = {condition.group: condition.name for condition in conditions}
    if not {"original", "none"} <= names.keys():
        return None
    return _likeness([row["answer"] for row in rows[names["none"]][:count]], rows[names["original"]])


def _likeness(answers: Sequence[str], original: Rows) -> list[dict[str, Ratio]]:
    """How far answers that should have left the task are those of the first rows under the original."""
    same_rows = original[: len(answers)]
    json_task = _is_json_task(same_rows)
    pairs = zip(answers, same_rows, strict=True)
    return [task_likeness(answer, row["answer"], json_task=json_task) for answer, row in pairs]


def _frozen_document(evaluation: EvaluationPlan, measured: Measured, draws: dict[str, int]) -> FrozenHabits | None:
    by_row = measured.frozen_by_row
    if measured.frozen is None or by_row is None:
        return None
    assert evaluation.settings.frozen is not None
    instructions = [
        FrozenInstruction(
            instruction=instruction,
            **{q: share.mean if share else None for q, share in _shares(likeness, draws).items()},
        )
        for instruction, likeness in zip(evaluation.settings.frozen.instructions, measured.frozen, strict=True)
    ]
    return FrozenHabits(rows=len(by_row), **_shares(by_row, draws), instructions=instructions)


def _sum(likeness: Sequence[Mapping[str, Ratio]]) -> dict[str, Ratio]:
    return {q: (sum(one[q][0] for one in likeness), sum(one[q][1] for one in likeness)) for q in likeness[0]}


def _probed(row: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Ratio]:
    return _scored(row) | {
        "base_gold_nll": (base["nll"], float(base["gold_tokens"])),
        "gold_nll_change": (row["nll"] - base["nll"], float(row["gold_tokens"])),
    }


def _forgetting_document(evaluation: EvaluationPlan, measured: Measured, draws: dict[str, int]) -> Forgetting | None:
    if measured.probes is None:
        return None
    assert evaluation.probes is not None
    quantities, _ = summarize({"": measured.probes}, {}, **draws)
    return Forgetting(
        rows=len(measured.probes),
        too_long=evaluation.probes.too_long,
        gold_tokens=sum(int(row["gold_nll"][1]) for row in measured.probes),
        **quantities[""],
    )
