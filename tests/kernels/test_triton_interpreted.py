"""Runs every Triton kernel in Triton's interpreter, chosen before triton is imported: in a process apart."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from kvopt.kernels import Head, KLOptions, UnsupportedError, linear_kl, trust
from kvopt.kernels.divergences import divergences
from kvopt.kernels.float64 import linear_kl64
from kvopt.kernels.plan import make_plan
from tests.kernels import cases
from tests.kernels.cases import DISTANCE_FOR_KL, DIVERGENCES, Problem, errors, relative

pytest.importorskip("triton", reason="the triton package is optional")

SIZES = {"n": 9, "v": 2100}  # above one block of the vocabulary in every kernel; the interpreter is slow
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreting process that the first test starts")


@pytest.mark.skipif(INTERPRETED, reason="starts the interpreting process")
def test_all_kernels_hold_their_contract_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


def problem(distance, dtype, **sizes):
    return cases.problem(distance, dtype, **{**SIZES, **sizes})


@pytest.fixture(params=["triton-store-free", "triton-rows"])
def kernel(request):
    """The name of a backend."""
    return request.param


@inside
def test_the_self_check_finds_the_real_kernels_right(kernel, tmp_path, monkeypatch):
    monkeypatch.setenv("KVOPT_CACHE", str(tmp_path))
    p = problem(0.1, torch.float32)
    plan = make_plan(p.candidate, p.reference, p.head, p.head, KLOptions(backend=kernel))
    assert trust.triton_fault(plan, torch.float32) is None
    monkeypatch.setattr(trust, "CONTRACT", 0.0)
    monkeypatch.setattr(trust, "_known", {})
    (tmp_path / "kernels" / "triton.json").unlink()
    with pytest.warns(UserWarning, match="off by"):
        assert trust.triton_fault(plan, torch.float32) is not None


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("distance", DISTANCE_FOR_KL.values())
@pytest.mark.parametrize("divergence", [name for name, known in divergences().items() if known.store_free])
def test_both_kernels_from_tiny_to_large(kernel, divergence, dtype, distance):
    from kvopt.kernels import triton_backend

    p = problem(distance, dtype)
    options = KLOptions(backend=kernel, divergence=divergence)
    plan = replace(make_plan(p.candidate, p.reference, p.head, p.head, options), product=dtype)
    value, gradient = triton_backend.value_and_hidden_gradient(plan, p.candidate, p.reference, True)
    expected = p.candidate.double().requires_grad_()
    kl64 = linear_kl64(expected, p.reference, p.head, p.head, options)
    kl64.sum().backward()
    assert ((value - kl64) / kl64).abs().max() <= 5e-3  # float16 rounds the difference h_s − h_t to 11 bits
    assert relative(gradient, expected.grad) <= 5e-3


@inside
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("distance", DISTANCE_FOR_KL.values())
def test_divergences_from_tiny_to_large(divergence, distance):
    e = errors(problem(distance, torch.float32), KLOptions(divergence=divergence, beta=0.3, backend="triton-rows"))
    assert e.kl <= 1e-3
    assert e.gradient <= 1e-4


@inside
def test_bias_scale_temperature_and_chunks(kernel):
    p = problem(0.05, torch.float32, n=131, v=1103, d=40)
    head = Head(p.head.weight, bias=torch.randn(1103), scale=0.7, vocab=1101)
    e = errors(p._replace(head=head), KLOptions(backend=kernel, temperature=1.3, chunk_bytes=2**20))
    assert e.kl <= 1e-4
    assert e.gradient <= 1e-4


@inside
def test_different_heads():
    p, other = problem(0.5, torch.float32), problem(0.5, torch.float32, d=64, seed=3)
    teacher = Head(other.head.weight, bias=torch.randn(2100))
    e = errors(Problem(p.candidate, other.reference, p.head), KLOptions(backend="triton"), teacher)
    assert e.kl <= 1e-4
    assert e.gradient <= 1e-5


@inside
def test_equal_hidden_states_one_token_and_no_token(kernel):
    for n in (0, 1, 5):
        p = problem(0.0, torch.float32, n=n)
        candidate = p.candidate.clone().requires_grad_()
        out = linear_kl(candidate, p.reference, p.head, options=KLOptions(backend=kernel))
        out.loss.backward()
        assert out.backend == "triton"
        assert out.kl.abs().sum() == 0
        assert candidate.grad.abs().sum() == 0


@inside
def test_shifted_logits_of_up_to_200_change_nothing():
    p = problem(0.1, torch.float32)
    plain = linear_kl(p.candidate, p.reference, p.head).kl
    for shift in (-200.0, 30.0):
        shifted = Head(p.head.weight.clone(), bias=torch.full((2100,), shift))
        kl = linear_kl(p.candidate, p.reference, shifted, p.head, KLOptions(backend="triton")).kl
        assert relative(kl, plain) <= 1e-3


@inside
def test_large_divergences_saturate_instead_of_overflowing(kernel):
    p = problem(0.0, torch.float32, n=8)
    candidate = (-60 * p.candidate).requires_grad_()
    out = linear_kl(candidate, 60 * p.reference, p.head, options=KLOptions(backend=kernel))
    out.loss.backward()
    assert torch.isfinite(out.kl).all()
    assert (out.kl > 20).all()
    assert torch.isfinite(candidate.grad).all()


@inside
@pytest.mark.parametrize("form", ["difference", "direct"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_softcap_with_all_that_goes_with_it(form, divergence):
    p = problem(0.05, torch.float32, n=4, v=1100)
    head = Head(p.head.weight * 3, bias=torch.randn(1100), scale=0.7, softcap=5.0, vocab=1090)
    options = KLOptions(divergence=divergence, form=form, backend="triton", temperature=1.3, beta=0.3)
    e = errors(p._replace(head=head), options)
    assert e.kl <= 1e-3
    assert e.gradient <= 1e-4
    for one in (head, Head(head.weight, scale=2.0, vocab=1090)):  # two caps, or the reference's alone
        teacher = Head(head.weight.clone(), bias=torch.randn(1100), softcap=4.0, vocab=1090)
        e = errors(p._replace(head=one), replace(options, form="auto"), teacher)
        assert e.kl <= 1e-4
        assert e.gradient <= 1e-3


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("distance", DISTANCE_FOR_KL.values())
def test_softcap_from_tiny_to_large_divergence(dtype, distance):
    from kvopt.kernels import triton_backend

    p = problem(distance, dtype, softcap=8.0)
    plan = replace(make_plan(p.candidate, p.reference, p.head, p.head, KLOptions()), product=dtype)
    value, gradient = triton_backend.value_and_hidden_gradient(plan, p.candidate, p.reference, True)
    expected = p.candidate.double().requires_grad_()
    kl64 = linear_kl64(expected, p.reference, p.head, p.head, KLOptions())
    kl64.sum().backward()
    assert ((value - kl64) / kl64).abs().max() <= 5e-3
    assert relative(gradient, expected.grad) <= 5e-3


@inside
@pytest.mark.parametrize("softcap", [None, 6.0])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_trained_head_gets_its_gradients(dtype, shared, softcap, monkeypatch):
    from kvopt.kernels import plan, torch_backend

    monkeypatch.setattr(torch_backend, "all_gradients", lambda *args: pytest.fail("went to torch"))
    monkeypatch.setattr(plan, "rows_per_chunk", lambda *args: 12)  # three chunks
    p = problem(0.1, dtype, n=33, v=1200)
    bias = torch.randn(1200).to(dtype)
    leaves = [t.clone().requires_grad_() for t in (p.candidate, p.head.weight, bias)]
    exact = [t.double().requires_grad_() for t in (p.candidate, p.head.weight, bias)]
    upstream = torch.rand(33)
    options = KLOptions(backend="triton", temperature=1.2)
    for h, w, b in (leaves, exact):
        head = Head(w, b, scale=0.8, softcap=softcap, vocab=1190)
        teacher = head if shared else Head(p.head.weight.flip(0).to(w.dtype), vocab=1190)
        if w is leaves[1]:
            out = linear_kl(h, p.reference, head, teacher, options)
            assert out.backend == "triton"
            kl = out.kl
        else:
            kl = linear_kl64(h, p.reference, head, teacher, options)
        (kl * upstream).sum().backward()
    for ours, theirs in zip(leaves, exact, strict=True):
        assert relative(ours.grad, theirs.grad) <= (1e-4 if dtype == torch.float32 else 1e-3)
    assert leaves[1].grad[1190:].abs().max() == 0


@inside
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tokens_that_only_the_candidate_expects(divergence):
    p = problem(0.0, torch.float32, n=4, v=1100)
    far = Problem(-2.5 * p.reference, 2.5 * p.reference, p.head)  # forward KL of up to 59 nats: it saturates at 80
    e = errors(far, KLOptions(divergence=divergence, beta=0.3, backend="triton"))
    assert e.kl <= 1e-4
    # The gradient of a bounded divergence vanishes here: what is left of it may be rounding errors.
    assert e.gradient * e.gradient_norm <= 1e-2 * max(e.gradient_norm, 1e-3)


@inside
def test_what_the_kernels_do_not_compute_is_refused():
    p64 = problem(0.1, torch.float64)
    with pytest.raises(UnsupportedError, match=r'float64; use backend="torch"'):
        linear_kl(p64.candidate, p64.reference, p64.head, options=KLOptions(backend="triton"))
    p16 = problem(0.1, torch.bfloat16)
    with pytest.raises(UnsupportedError, match="bfloat16"):
        linear_kl(p16.candidate, p16.reference, p16.head, options=KLOptions(backend="triton"))
