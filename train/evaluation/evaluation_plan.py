"""What an evaluation measures: the contexts, the rows, the metrics and the settings, for all models of a command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from kvopt.config.evaluation import EvaluateConfig
from kvopt.config.metrics import Metric
from kvopt.measure.reference import Reference
from kvopt.run.directory import Workspace
from kvopt.run.encoded_task import EncodedTask
from kvopt.task.examples import Example
from kvopt.train.evaluation.conditions import Condition
from kvopt.train.evaluation.probes import Probes


@dataclass(frozen=True)
class EvaluationPlan:
    """What is measured, and under which contexts; one for all models of a command.

    Attributes:
        task: template, data and base.
        conditions: the contexts.
        reference: of the base under the original template.
        settings: the ``evaluate`` section that holds.
        at: where answers and likelihoods are stored.
        probes: prompts of other tasks, None without them.
        whole: whether these are all conditions of the section: only then frozen prompts are asked, and
            ``evaluation.json`` is written.
    """

    task: EncodedTask
    conditions: Sequence[Condition]
    reference: Reference
    settings: EvaluateConfig
    at: Workspace
    probes: Probes | None = None
    whole: bool = True

    def __post_init__(self) -> None:
        for metric in self.metrics:
            if doubt := metric.doubt([example.output for example in self.answered]):
                self.at.say(f"warning: {metric.label}: {doubt}")

    @cached_property
    def metrics(self) -> list[Metric]:
        return [metric.prepared(self.task.inputs.base_dir) for metric in self.settings.metrics]

    @property
    def scored(self) -> Sequence[Example]:
        """The rows whose gold likelihood is measured."""
        return self.task.dataset.validation

    @property
    def answered(self) -> Sequence[Example]:
        """The rows that are answered."""
        return self.scored[: self.settings.rows]
