"""The part of ``kvopt validate`` that is about students: what their sections name is there and can be read, without a
model. What trains and measures them takes seconds to import, so it is imported where a config has such a section.
"""

from __future__ import annotations

from kvopt.run.inputs import Inputs


def check_students(inputs: Inputs) -> None:
    """Check the sections ``students`` and ``study``. Raises InputError for the first fault."""
    if not inputs.config.students and inputs.config.study is None:
        return
    from kvopt.train.arms import study_arms
    from kvopt.train.training import check_student, chosen

    if inputs.config.students:
        chosen(inputs)
    if inputs.config.study is not None:
        for arm in study_arms(inputs.config):
            check_student(inputs, arm.config)


def check_evaluation(inputs: Inputs) -> None:
    """Read what the section ``evaluate`` names (and that of a study): metrics, hand-written templates, probes. Raises
    InputError.
    """
    study = inputs.config.study
    for settings in (inputs.config.evaluate, *([study.evaluate] if study and study.evaluate else [])):
        for metric in settings.metrics:
            metric.prepared(inputs.base_dir)
        if settings.templates is not None:
            from kvopt.train.evaluation.conditions import hand_written

            hand_written(inputs, settings)
        if settings.probes is not None:
            from kvopt.train.evaluation.probes import probe_examples

            probe_examples(inputs, settings.probes)
