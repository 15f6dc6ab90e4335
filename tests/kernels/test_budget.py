"""``kvopt bench kl --seconds``: on a machine of any speed the benchmark ends in about the time that it was given.

The clock is a made-up one that moves only when a product or a contender runs, by an amount that stands for the machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kvopt.kernels import benchmark, budget, contenders
from kvopt.kernels.benchmark import KLInputs, run

ASKED = 2000


@dataclass
class Machine:
    """Seconds that a product takes for each token; ``time`` is what the clock shows."""

    token_seconds: float
    time: float = 0.0

    def product(self, inputs: KLInputs) -> Tensor:
        self.time += len(inputs.reference) * self.token_seconds
        return inputs.reference

    def contender(self, products: float, compiling: float = 0.0) -> Callable[[torch.device], contenders.Loss]:
        """A contender that takes so many products a call, and ``compiling`` seconds at its first call."""

        def build(device: torch.device) -> contenders.Loss:
            waits = [compiling]

            def loss(h: Tensor, reference: Tensor, weight: Tensor) -> Tensor:
                self.time += products * len(h) * self.token_seconds + (waits.pop() if waits else 0)
                return (h - reference).square().mean()

            return loss

        return build


@pytest.fixture
def on_machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Machine, dict]]:
    def bench(token_seconds: float, seconds: float | None, **products: object) -> tuple[Machine, dict]:
        machine = Machine(token_seconds)
        monkeypatch.setattr(budget, "now", lambda: machine.time)
        monkeypatch.setattr(benchmark, "head_product", machine.product)
        builders = {
            name: machine.contender(*one) if isinstance(one, tuple) else machine.contender(one)  # type: ignore[arg-type]
            for name, one in products.items()
        }
        monkeypatch.setattr(contenders, "BUILDERS", builders)
        return machine, run([(ASKED, 8, 50)], list(products), seconds=seconds, show=False)["shapes"][0]

    return bench


@pytest.mark.parametrize("token_seconds", [1e-6, 1e-3, 1e-2])
def test_any_machine_ends_in_the_time_that_it_was_given(on_machine: Callable, token_seconds: float) -> None:
    machine, entry = on_machine(token_seconds, 60.0, fast=3, middling=5, slow=10)
    assert machine.time <= 60
    assert set(entry["results"]) | set(entry["skipped"]) == {"fast", "middling", "slow"}
    assert token_seconds > 5e-3 or not entry["skipped"]
    assert entry["asked"][0] == ASKED
    assert entry["shape"][0] == ASKED if token_seconds < 1e-5 else 64 <= entry["shape"][0] < ASKED
    assert entry["results"]["fast"]["products"] == pytest.approx(3)
    assert entry["results"]["fast"]["of_2f"] == pytest.approx(2 / 3)


def test_more_time_is_used_for_more_tokens_and_none_is_no_limit(on_machine: Callable) -> None:
    tokens = [on_machine(1e-3, seconds, one=3, two=5)[1]["shape"][0] for seconds in (30.0, 60.0, 120.0)]
    assert tokens[0] < tokens[1] < tokens[2]
    machine, entry = on_machine(1e-2, None, one=3, two=5)
    assert entry["shape"][0] == ASKED
    assert entry["results"]["two"]["rounds"] == 5
    assert machine.time > 500


def test_a_contender_far_too_slow_is_skipped_by_name_and_the_others_are_measured(on_machine: Callable) -> None:
    machine, entry = on_machine(1e-3, 60.0, fast=3, glacial=300, middling=5)
    assert set(entry["results"]) == {"fast", "middling"}
    assert "one round would take about" in entry["skipped"]["glacial"]
    assert "raise --seconds" in entry["skipped"]["glacial"]
    assert machine.time <= 60


def test_the_time_of_compiling_counts(on_machine: Callable) -> None:
    machine, entry = on_machine(1e-4, 60.0, compiled=(3, 25.0), fast=3, middling=5)
    assert entry["results"]["compiled"]["first_call_s"] >= 25
    assert "rounds" in entry["results"]["middling"]
    assert machine.time <= 60
    machine, entry = on_machine(1e-3, 20.0, fast=3, compiled=(3, 25.0))
    assert set(entry["skipped"]) == {"compiled"}


def test_without_hardware_for_it_bfloat16_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(budget, "cpu_has_bfloat16_products", lambda has=has: has)
        assert budget.fast_dtype(torch.device("cpu")) == expected
        assert run([(70, 8, 50)], ["torch"], repeats=1, show=False)["dtype"] == str(expected).removeprefix("torch.")


def test_rounds_go_before_tokens_do() -> None:
    assert budget.fitting(1000, 5, 4, 1e-3, math.inf) == (1000, 5)
    assert budget.fitting(1000, 5, 4, 1e-9, 60.0) == (1000, 5)
    tokens, rounds = budget.fitting(1000, 5, 10, 2e-3, 60.0)
    assert rounds == 3
    assert 64 <= tokens < 256


def test_progress_is_said_as_contenders_finish(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[str] = []
    run([(70, 8, 50)], ["torch", "nonsense"], repeats=1, finished=lambda shape, name, outcome: seen.append(name))
    said = capsys.readouterr().err
    assert seen == ["torch", "nonsense"]
    assert said.index("N=70 D=8 V=50: torch: ") < said.index("skipped nonsense: unknown")
