"""``kvopt bench step`` and ``bench score`` on the device: both sides of each measure the same KL."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kvopt.bench import steps as benchmark
from kvopt.task.seam import Encoded
from tests.gpu.device import ON_GPU, base_on_device
from tests.tasks import OTHER, Task, make_task, template_for
from tests.tiny import MODELS

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=MODELS)
def task(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(base_on_device(request.param), tmp_path_factory.mktemp(request.param))


def test_a_step_and_peft_measure_the_same_kl(task: Task, tmp_path: Path) -> None:
    prefix = task.original.prefix(task.base)
    case = benchmark.step_case(task.base, prefix, task.encoded, tmp_path, tokens=6, batch_size=8)
    ours, peft = benchmark.our_step(case, 2), benchmark.peft_step(case, 2)
    assert ours.value > 1e-4
    assert ours.value == pytest.approx(peft.value, rel=1e-2)
    assert min(ours.seconds, peft.seconds) > 0
    if ON_GPU:
        assert 0 < ours.extra_bytes < ours.peak_bytes


def test_scores_and_full_prompts_measure_the_same_kl(task: Task) -> None:
    some = Encoded(task.encoded.prefix, task.encoded.rows[:5])
    contexts = [task.text("other", template_for(task.base, OTHER)), replace(task.original, name="again")]
    case = benchmark.ScoreCase(task.base, contexts, some, task.reference)
    ours, naive = benchmark.our_scores(case), benchmark.naive_scores(case)
    assert ours.value > 1e-4
    assert ours.value == pytest.approx(naive.value, rel=1e-2, abs=1e-6)
