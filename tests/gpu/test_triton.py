"""Both Triton kernels at ragged sizes against float64.

On a GPU they are compiled and run there. On the CPU they run in Triton's interpreter, in a process apart (it is chosen
before triton is imported) and without bfloat16, whose products the interpreter gets wrong in silence.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from kvopt.kernels import Head, KLOptions, UnsupportedError, linear_kl, plan
from kvopt.kernels.float64 import linear_kl64
from tests.gpu import device
from tests.gpu.device import DTYPES, ON_GPU, random
from tests.kernels.cases import DISTANCE_FOR_KL, Problem, errors, relative

pytest.importorskip("triton", reason="the triton package is optional")
pytestmark = pytest.mark.gpu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNS = ON_GPU or INTERPRETED
INTERPRETED_SIZES = {"triton-store-free": {"n": 131, "d": 34, "v": 259}, "triton-rows": {"n": 7, "d": 34, "v": 1103}}
"""Above one block in every kernel, and small: the interpreter is slow. A program of the row kernel takes one row."""
DISTANCES = list(DISTANCE_FOR_KL.values()) if ON_GPU else [1.6e-2]
here = pytest.mark.skipif(not RUNS, reason="runs on a GPU, or in the interpreting process that the first test starts")


@pytest.mark.skipif(RUNS, reason="starts the interpreting process")
def test_the_kernels_hold_their_contract_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


def problem(kernel: str, distance: float, dtype: torch.dtype, **changes: int) -> Problem:
    return device.problem(distance, dtype, **{**({} if ON_GPU else INTERPRETED_SIZES[kernel]), **changes})


@pytest.fixture(params=["triton-rows", "triton-store-free"])
def kernel(request: pytest.FixtureRequest) -> str:
    """The name of a backend."""
    return request.param


@pytest.fixture(params=DTYPES if ON_GPU else [torch.float32, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """What the device computes rightly."""
    return request.param


@here
@pytest.mark.parametrize("distance", DISTANCES)
def test_forward_kl(kernel: str, dtype: torch.dtype, distance: float) -> None:
    if ON_GPU and kernel == "triton-store-free" and dtype == torch.float32:
        with pytest.raises(UnsupportedError, match="16-bit inputs"):
            errors(problem(kernel, distance, dtype), KLOptions(backend=kernel))
        return
    e = errors(problem(kernel, distance, dtype), KLOptions(backend=kernel))
    assert e.kl <= 1e-2
    assert e.gradient <= 1e-2


@here
@pytest.mark.parametrize("divergence", ["reverse", "jsd"])
@pytest.mark.parametrize("distance", DISTANCES)
def test_other_divergences(divergence: str, dtype: torch.dtype, distance: float) -> None:
    e = errors(
        problem("triton-rows", distance, dtype), KLOptions(divergence=divergence, beta=0.3, backend="triton-rows")
    )
    assert e.kl <= 1e-2
    assert e.gradient <= 1e-2


@here
@pytest.mark.parametrize("form", ["difference", "direct"])
def test_softcap_bias_scale_and_temperature(form: str, dtype: torch.dtype) -> None:
    p = problem("triton-rows", 0.05, dtype)
    size = len(p.head.weight)
    head = Head(p.head.weight, bias=random(size).to(dtype), scale=0.7, softcap=6.0, vocab=size - 13)
    e = errors(p._replace(head=head), KLOptions(form=form, backend="triton-rows", temperature=1.3))
    assert e.kl <= 1e-2
    assert e.gradient <= 1e-2


@here
def test_a_biased_head_in_many_chunks(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "rows_per_chunk", lambda *args: 50 if ON_GPU else 3 if kernel == "triton-rows" else 129)
    p = problem(kernel, 0.05, torch.float16)
    size = len(p.head.weight)
    head = Head(p.head.weight, bias=random(size).half(), scale=0.7, vocab=size - 13)
    e = errors(p._replace(head=head), KLOptions(backend=kernel, temperature=1.3))
    assert e.kl <= 1e-2
    assert e.gradient <= 1e-2


@here
def test_masked_tokens_and_weights(kernel: str) -> None:
    p = problem(kernel, 0.1, torch.float16)
    mask, weights = random(len(p.candidate)) > 0.3, random(len(p.candidate), seed=2).abs()
    spoiled = torch.where(mask[:, None], p.candidate, torch.nan).requires_grad_()
    exact = p.candidate[mask].double().requires_grad_()
    out = linear_kl(spoiled, p.reference, p.head, options=KLOptions(backend=kernel), mask=mask, weights=weights)
    kl64 = linear_kl64(exact, p.reference[mask], p.head, p.head, KLOptions())
    (kl64 * weights[mask]).sum().div(weights[mask].sum()).backward()
    out.loss.backward()
    assert out.backend == "triton"
    assert ((out.kl[mask] - kl64) / kl64).abs().max() <= 1e-2
    assert relative(spoiled.grad[mask], exact.grad) <= 1e-2
    assert spoiled.grad[~mask].abs().max() == 0


@here
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_a_trained_head_gets_its_gradients(dtype: torch.dtype, shared: bool) -> None:
    p = problem("triton-rows", 0.1, dtype)
    leaves = [p.candidate.clone().requires_grad_(), p.head.weight.clone().requires_grad_()]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    for h, w in (leaves, exact):
        head = Head(w, scale=0.8)
        teacher = head if shared else Head(p.head.weight.flip(0).to(w.dtype))
        if w is leaves[1]:
            out = linear_kl(h, p.reference, head, teacher, KLOptions(backend="triton"))
            assert out.backend == "triton"
            out.kl.sum().backward()
        else:
            linear_kl64(h, p.reference, head, teacher, KLOptions()).sum().backward()
    for ours, theirs in zip(leaves, exact, strict=True):
        assert relative(ours.grad, theirs.grad) <= (1e-4 if dtype == torch.float32 else 1e-2)


@here
def test_equal_hidden_states_one_token_and_no_token(kernel: str) -> None:
    for count in (0, 1, 5):
        p = problem(kernel, 0.0, torch.float16, n=count)
        candidate = p.candidate.clone().requires_grad_()
        out = linear_kl(candidate, p.reference, p.head, options=KLOptions(backend=kernel))
        out.loss.backward()
        assert out.kl.abs().sum() == 0
        assert candidate.grad.abs().sum() == 0
