"""Extra memory does not grow with the number of tokens, and stays near the budget."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import Tensor

from kvopt.kernels import Head, KLOptions, TopK, linear_kl, linear_scores, memory, moments_of
from kvopt.kernels.memory import AllocationMeter, peak_resident
from kvopt.kernels.memory_curve import run_memory
from kvopt.kernels.torch_backend import BLOCK_BYTES

VOCABULARY, FEATURES, BUDGET = 40_000, 4, 2 * 2**20
OPTIONS = KLOptions(chunk_bytes=BUDGET)
ALLOWED = BUDGET + 14 * BLOCK_BYTES
"""A chunk and the row-wise temporaries of a block, most of them where log-ratios are large."""


def inputs(count: int, dtype: torch.dtype, distance: float) -> tuple[Tensor, Tensor, Head]:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(count, FEATURES, generator=generator)
    candidate = reference + distance * torch.randn(count, FEATURES, generator=generator)
    return candidate.to(dtype), reference.to(dtype), Head(torch.randn(VOCABULARY, FEATURES).to(dtype))


def loss(candidate: Tensor, reference: Tensor, head: Head) -> None:
    linear_kl(candidate.requires_grad_(), reference, head, options=OPTIONS).loss.backward()


def scores(candidate: Tensor, reference: Tensor, head: Head) -> None:
    linear_scores(candidate, reference, head, torch.zeros(len(candidate), dtype=torch.int64), OPTIONS)


def moments(candidate: Tensor, reference: Tensor, head: Head) -> None:
    stored = moments_of(reference, head, options=OPTIONS)
    linear_kl(candidate.requires_grad_(), stored, head, options=OPTIONS).loss.backward()


def top_k(candidate: Tensor, reference: Tensor, head: Head) -> None:
    ids = torch.arange(8).expand(len(candidate), -1)
    stored = TopK(ids, torch.full(ids.shape, -3.0))
    linear_kl(candidate.requires_grad_(), stored, head, options=OPTIONS).loss.backward()


def trained(candidate: Tensor, reference: Tensor, head: Head) -> None:
    loss(candidate, reference, Head(head.weight.clone().requires_grad_()))


def masked_reverse(candidate: Tensor, reference: Tensor, head: Head) -> None:
    mask = torch.arange(len(candidate)) % 2 == 0
    options = replace(OPTIONS, divergence="reverse")
    linear_kl(candidate.requires_grad_(), reference, head, options=options, mask=mask).loss.backward()


def extra(work: Callable[[Tensor, Tensor, Head], None], count: int, dtype: torch.dtype, distance: float) -> int:
    given = inputs(count, dtype, distance)
    with AllocationMeter() as meter:
        work(*given)
    return meter.peak


@pytest.mark.parametrize("distance", [0.01, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("work", [loss, scores, moments, top_k, trained, masked_reverse])
def test_extra_memory_is_flat_in_the_number_of_tokens(work, dtype, distance, monkeypatch):
    from kvopt.kernels import plan

    monkeypatch.setattr(plan, "cpu_has_bfloat16_products", lambda: True)
    few, many = extra(work, 50, dtype, distance), extra(work, 200, dtype, distance)
    results = 150 * (FEATURES * 40 + 200)  # gradients, hidden states that a mask picks, and numbers of each token
    assert many - few <= results + BLOCK_BYTES  # chunks of 13 rows are not chunks of 12; an N x V tensor adds 12 MB
    head = 10 * VOCABULARY * FEATURES * 4 if work is trained else 0
    assert many <= ALLOWED + head + 200 * (FEATURES * 40 + 200)


def test_the_meter_sees_what_an_operation_makes_and_what_is_freed():
    with AllocationMeter() as meter:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b[:10]
        del b
        assert meter.live == 4000  # the view keeps its storage
        c = c.clone()
        assert meter.live == 40
    assert meter.peak == 8000
    assert c.sum() == 10


def test_full_logits_would_be_seen():
    def plain(candidate: Tensor, reference: Tensor, head: Head) -> None:
        (candidate @ head.weight.T).softmax(-1)

    assert extra(plain, 200, torch.float32, 0.1) >= 2 * 200 * VOCABULARY * 4


def test_the_curve_is_measured_in_processes_of_their_own_and_written(tmp_path, capsys):
    report = run_memory((96,), vocabulary=40_000, features=4, budget=2**20, out=tmp_path)
    assert [entry["tokens"] for entry in report["curve"]] == [96]
    for entry in report["curve"]:
        assert 0 < entry["counted_mib"] < 12
        assert entry["extra_mib"] < 60
    assert "| 96 |" in capsys.readouterr().err
    assert (tmp_path / "bench-kl-memory.json").is_file()


def test_the_peak_of_a_process_holds_what_was_freed_and_not_what_its_parent_held():
    size = 2**30
    held = torch.ones(size, dtype=torch.uint8)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        of_child = pool.apply(peak_resident)
    del held
    assert 2**20 < of_child < size <= peak_resident()


def test_without_the_resource_module_the_peak_is_that_of_windows(monkeypatch):
    counters = SimpleNamespace(rss=3, peak_wset=7)
    monkeypatch.setattr(memory, "resource", None)
    monkeypatch.setattr(memory, "Path", lambda path: SimpleNamespace(exists=lambda: False))
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: counters))
    assert peak_resident() == 7
