"""``kvopt bench step``, ``score`` and ``long``: sizes that fit a time, bare products beside them, growth by token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kvopt.bench import steps
from kvopt.bench.floor import fitting_rows, fitting_scores, products
from kvopt.bench.long_gold import LongPoint, as_document, bench_long, long_rows
from kvopt.bench.variants import as_json
from kvopt.config.document import load_config
from kvopt.task.seam import Row
from tests.jobs import write_job
from tests.tasks import make_task
from tests.tiny import tiny_base


def test_rows_are_as_many_as_the_time_allows() -> None:
    assert fitting_rows(16, row_seconds=0.1, calls=4, seconds=60) == 16
    assert fitting_rows(16, row_seconds=1.0, calls=4, seconds=20) == 4
    assert fitting_rows(16, row_seconds=100.0, calls=4, seconds=20) == 1


@pytest.mark.parametrize(("seconds", "sizes"), [(1e6, (8, 64)), (200, (8, 20)), (60, (3, 16)), (5, (1, 4))])
def test_scores_lose_rows_before_mutations(seconds: float, sizes: tuple[int, int]) -> None:
    assert fitting_scores(8, 64, pair_seconds=0.5, calls=2, seconds=seconds) == sizes


def test_the_floor_is_the_products_of_linear_layers_and_head() -> None:
    base = tiny_base("llama")
    layers = sum(m.weight.numel() for m in base.backbone.modules() if isinstance(m, torch.nn.Linear))
    counter = FlopCounterMode(display=False)
    with counter:
        products(base, 10, 4, head_products=3, backward=True)()
    assert counter.get_total_flops() == 2 * (2 * 10 * layers + 3 * 4 * base.head.weight.numel())


def test_a_step_and_scores_say_what_share_of_them_is_products(tmp_path: Path) -> None:
    task = make_task(tiny_base("llama"), tmp_path)
    prefix = task.original.prefix(task.base)
    ours = steps.our_step(
        steps.step_case(task.base, prefix, task.encoded, tmp_path / "step", tokens=4, batch_size=3), 1
    )
    scores = steps.our_scores(steps.ScoreCase(task.base, [task.original], task.encoded, task.reference))
    for title, variant in (("step", ours), ("score", scores)):
        assert variant.floor_seconds is not None
        share = as_json(title, [variant, variant])["floor_share"]
        assert share == pytest.approx(variant.floor_seconds / variant.seconds)


def test_long_rows_hold_the_gold_tokens_asked_for() -> None:
    rows = long_rows([Row("a", (1, 2), (10, 11, 12)), Row("b", (3,), (20, 21))], 17, longest=7)
    assert [len(row.gold) for row in rows] == [7, 7, 3]
    assert [token for row in rows for token in row.gold] == ([10, 11, 12, 20, 21] * 4)[:17]
    assert {row.body for row in rows} == {(1, 2)}
    assert len({row.example_id for row in rows}) == 3


def test_growth_is_from_the_fewest_tokens_to_the_most() -> None:
    points = [LongPoint("step", n, n, seconds, extra) for n, seconds, extra in ((100, 1.0, 50), (400, 6.0, 60))]
    growth = as_document(points)["growth"]["step"]
    assert growth == pytest.approx({"tokens": 4, "seconds_per_token": 1.5, "extra_bytes": 1.2})
    assert as_document(points[:1])["growth"]["step"]["tokens"] == 1


def test_every_stage_is_measured_at_every_number_of_tokens(tmp_path: Path) -> None:
    config, base_dir = load_config(write_job(tmp_path / "job"))
    points = bench_long(config, base_dir, tokens=(900, 300))
    assert [(p.stage, p.gold_tokens) for p in points] == [
        (stage, count) for count in (300, 900) for stage in ("reference", "score", "step")
    ]
    assert all(p.seconds > 0 for p in points)
    assert all(p.row_tokens < 512 for p in points)
    assert [p.gold_tokens for p in bench_long(config, base_dir, tokens=(300, 900), seconds=1e-9)] == [300] * 3
