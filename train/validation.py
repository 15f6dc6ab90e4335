"""The part of ``kvopt validate`` that is about students: what their sections name is there and can be read, without a
model.
"""

from __future__ import annotations

from kvopt.run import Run
from kvopt.train.evaluation.conditions import hand_written
from kvopt.train.evaluation.metrics import build_metrics
from kvopt.train.evaluation.probes import probe_examples
from kvopt.train.stages import check_student, chosen
from kvopt.train.study.arms import study_arms


def check_students(run: Run) -> None:
    """Check the sections ``students`` and ``study``. Raises InputError for the first fault."""
    if run.config.students:
        chosen(run)
    if run.config.study is not None:
        for arm in study_arms(run.config):
            check_student(run, arm.config)


def check_evaluation(run: Run) -> None:
    """Read what the section ``evaluate`` names (and that of a study): metrics, hand-written templates, probes. Raises
    InputError.
    """
    study = run.config.study
    for settings in (run.config.evaluate, *([study.evaluate] if study and study.evaluate else [])):
        build_metrics(settings.metrics, run.base_dir)
        hand_written(run, settings)
        if settings.probes is not None:
            probe_examples(run, settings.probes)
