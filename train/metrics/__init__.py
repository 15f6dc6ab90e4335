"""Metrics of answers: one small file each; :func:`build_metrics` makes those that a config names.

A new metric is a file here with a :class:`Metric`, its settings in ``kvopt.config.evaluation``, and a line in
:func:`build_metric`. A user's own needs none of these: ``python:module:function`` (see :mod:`.own`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvopt.config import evaluation as config
from kvopt.train.metrics.base import Item, Metric, Ratio, Verdict
from kvopt.train.metrics.checks import Checks
from kvopt.train.metrics.exact_match import ExactMatch
from kvopt.train.metrics.json_schema import JSONSchema, read_schema
from kvopt.train.metrics.json_valid import JSONValid
from kvopt.train.metrics.judge import INSTRUCTION, Judge
from kvopt.train.metrics.own import load_own
from kvopt.train.metrics.regex import Regex
from kvopt.train.metrics.rouge_l import RougeL
from kvopt.train.metrics.slots import Slots

__all__ = ["Item", "Metric", "Ratio", "Verdict", "build_metric", "build_metrics"]


def build_metrics(settings: Sequence[Any], base_dir: Path) -> list[Metric]:
    """The metrics of ``evaluate.metrics``; paths are relative to ``base_dir``. Raises InputError."""
    return [build_metric(one, base_dir) for one in settings]


def build_metric(settings: Any, base_dir: Path) -> Metric:
    """The metric that its settings ask for. Raises InputError for a schema or a function that cannot be used."""
    name = settings.label
    match settings:
        case config.ExactMatchConfig():
            return ExactMatch(name, tuple(settings.normalize))
        case config.JSONValidConfig():
            return JSONValid(name, settings.container)
        case config.SlotsConfig():
            return Slots(name, settings.path, settings.ignore_case)
        case config.RougeLConfig():
            return RougeL(name, settings.stemmer)
        case config.RegexConfig():
            return Regex(name, settings.pattern, settings.whole, settings.absent)
        case config.JSONSchemaConfig():
            return JSONSchema(name, read_schema(settings.definition, base_dir, f"evaluate.metrics.{name}.definition"))
        case config.JudgeConfig():
            return Judge(name, settings, settings.instruction or INSTRUCTION, settings.lowest, settings.highest)
        case config.OwnConfig():
            return load_own(settings.target, name, base_dir)
        case config.ChecksConfig():
            return Checks(name, tuple(build_metric(check, base_dir) for check in settings.checks))
    raise TypeError(f"no metric for {settings!r}")
