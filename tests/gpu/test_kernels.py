"""The divergence op on the device against float64, at ragged sizes: by the torch backend, and by whatever the table of
backends picks there.
"""

from __future__ import annotations

import pytest
import torch

from kvopt.kernels import Head, KLOptions, TopK, linear_kl, linear_scores, moments_of
from kvopt.kernels.float64 import linear_kl64, logits64
from tests.gpu.device import DEVICE, DTYPES, ON_GPU, RAGGED, on_device, problem, random
from tests.kernels.cases import DISTANCE_FOR_KL, Problem, errors, linear_scores64, relative

pytestmark = pytest.mark.gpu
BACKENDS = ["torch", "auto"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The torch backend, and the table's choice (Triton's kernels on a GPU)."""
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("distance", DISTANCE_FOR_KL.values())
def test_every_divergence_keeps_the_contract(
    dtype: torch.dtype, divergence: str, distance: float, backend: str
) -> None:
    e = errors(problem(distance, dtype), KLOptions(divergence=divergence, beta=0.3, backend=backend))
    assert e.kl <= 1e-2
    assert e.gradient <= 1e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["difference", "direct"])
def test_every_form_keeps_the_contract(dtype: torch.dtype, form: str, backend: str) -> None:
    for distance in DISTANCE_FOR_KL.values():
        e = errors(problem(distance, dtype), KLOptions(form=form, backend=backend))
        assert e.kl <= 1e-2
        assert e.gradient <= 1e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_reference_with_another_head_and_hidden_size(dtype: torch.dtype, backend: str) -> None:
    p, other = problem(0.5, dtype), problem(0.5, dtype, d=45, seed=3)
    teacher = Head(other.head.weight, bias=random(RAGGED["v"]).to(dtype))
    e = errors(Problem(p.candidate, other.reference, p.head), KLOptions(backend=backend), teacher)
    assert e.kl <= 1e-2
    assert e.gradient <= 1e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments_give_the_gradient_and_a_value_within_1e_4_nats(dtype: torch.dtype) -> None:
    for distance in list(DISTANCE_FOR_KL.values())[:3]:
        p = problem(distance, dtype)
        stored = moments_of(p.reference, p.head)
        candidate, exact = p.candidate.clone().requires_grad_(), p.candidate.double().requires_grad_()
        out = linear_kl(candidate, stored, p.head)
        kl64 = linear_kl64(exact, p.reference, p.head, p.head, KLOptions())
        out.kl.sum().backward()
        kl64.sum().backward()
        assert out.form == "moments"
        assert (out.kl - kl64).abs().max() <= 1e-4
        assert relative(candidate.grad, exact.grad) <= 1e-2


def test_a_stored_top_k_of_every_token_is_the_whole_distribution() -> None:
    p = problem(0.16, torch.float32)
    log_p = logits64(p.reference, p.head, 1.0).log_softmax(-1).float()
    ids = torch.arange(RAGGED["v"], device=DEVICE).expand(len(log_p), -1)
    candidate, exact = p.candidate.clone().requires_grad_(), p.candidate.double().requires_grad_()
    out = linear_kl(candidate, TopK(ids, log_p), p.head)
    kl64 = linear_kl64(exact, p.reference, p.head, p.head, KLOptions())
    out.kl.sum().backward()
    kl64.sum().backward()
    assert relative(out.kl, kl64) <= 1e-3
    assert relative(candidate.grad, exact.grad) <= 1e-2


@pytest.mark.parametrize("form", ["difference", "direct"])
@pytest.mark.parametrize("softcap", [None, 6.0])
@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_bias_scale_softcap_temperature_and_padding_of_the_head(
    form: str, softcap: float | None, divergence: str, backend: str
) -> None:
    p = problem(0.05, torch.float32)
    weight = torch.cat([p.head.weight, torch.full((61, RAGGED["d"]), 1e4, device=DEVICE)])
    bias = random(len(weight))
    head = Head(weight, bias=bias, scale=0.7, softcap=softcap, vocab=RAGGED["v"])
    options = KLOptions(divergence=divergence, form=form, backend=backend, temperature=1.3, beta=0.3)
    e = errors(p._replace(head=head), options)
    assert e.kl <= 1e-3
    assert e.gradient <= 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_tokens_change_nothing_even_when_they_hold_nan(dtype: torch.dtype, backend: str) -> None:
    p, options = problem(0.1, dtype), KLOptions(backend=backend)
    mask = random(RAGGED["n"]) > 0.3
    spoiled = torch.where(mask[:, None], p.candidate, torch.nan).requires_grad_()
    exact = p.candidate[mask].double().requires_grad_()
    out = linear_kl(spoiled, p.reference, p.head, options=options, mask=mask)
    kl64 = linear_kl64(exact, p.reference[mask], p.head, p.head, KLOptions())
    out.loss.backward()
    kl64.mean().backward()
    assert ((out.kl[mask] - kl64) / kl64).abs().max() <= 1e-2
    assert out.kl[~mask].abs().max() == 0
    assert relative(spoiled.grad[mask], exact.grad) <= 1e-2
    assert spoiled.grad[~mask].abs().max() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_enter_the_loss_and_its_gradient(dtype: torch.dtype, backend: str) -> None:
    p, weights = problem(0.1, dtype), random(RAGGED["n"]).abs()
    candidate, exact = p.candidate.clone().requires_grad_(), p.candidate.double().requires_grad_()
    out = linear_kl(candidate, p.reference, p.head, options=KLOptions(backend=backend), weights=weights)
    expected = (linear_kl64(exact, p.reference, p.head, p.head, KLOptions()) * weights).sum() / weights.sum()
    out.loss.backward()
    expected.backward()
    assert float(out.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-2)
    assert relative(candidate.grad, exact.grad) <= 1e-2


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_trained_head_gets_its_gradients(dtype: torch.dtype, shared: bool, backend: str) -> None:
    p, upstream = problem(0.1, dtype), random(RAGGED["n"]).abs()
    leaves = [t.clone().requires_grad_() for t in (p.candidate, p.head.weight, random(RAGGED["v"]).to(dtype))]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    for h, w, b in (leaves, exact):
        head = Head(w, b, scale=0.8)
        teacher = head if shared else Head(p.head.weight.flip(0).to(w.dtype))
        if w is leaves[1]:
            kl = linear_kl(h, p.reference, head, teacher, KLOptions(backend=backend)).kl
        else:
            kl = linear_kl64(h, p.reference, head, teacher, KLOptions())
        (kl * upstream).sum().backward()
    for ours, theirs in zip(leaves, exact, strict=True):
        assert relative(ours.grad, theirs.grad) <= (1e-4 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_are_those_of_float64(dtype: torch.dtype) -> None:
    gold = (random(RAGGED["n"]).abs() * 1000).long() % RAGGED["v"]
    for distance in DISTANCE_FOR_KL.values():
        p = problem(distance, dtype)
        ours = linear_scores(p.candidate, p.reference, p.head, gold)
        exact = linear_scores64(p.candidate, p.reference, p.head, gold, KLOptions())
        assert ((ours.kl - exact.kl) / exact.kl).abs().max() <= 1e-2
        for name in ("nll", "reference_nll", "entropy"):
            assert (getattr(ours, name) - getattr(exact, name)).abs().max() <= 1e-3
        assert (ours.agree == exact.agree).float().mean() >= 0.99  # a tie to the last bit may fall either way


def test_equal_hidden_states_give_exactly_zero(backend: str) -> None:
    for dtype in DTYPES:
        for count in (0, 1, RAGGED["n"]):
            p = problem(0.0, dtype, n=count)
            candidate = p.candidate.clone().requires_grad_()
            out = linear_kl(candidate, p.reference, p.head, options=KLOptions(backend=backend))
            out.loss.backward()
            assert out.kl.abs().sum() == 0
            assert candidate.grad.abs().sum() == 0


def test_chunks_and_strides_change_nothing(backend: str) -> None:
    for dtype in DTYPES:
        p = problem(0.1, dtype, n=700)
        apart = torch.empty(700, 2 * RAGGED["d"], dtype=dtype, device=DEVICE)[:, ::2].copy_(p.candidate)
        whole = linear_kl(p.candidate, p.reference, p.head, options=KLOptions(backend=backend)).kl
        small = linear_kl(apart, p.reference, p.head, options=KLOptions(backend=backend, chunk_bytes=2**20)).kl
        assert relative(small, whole) <= (1e-5 if dtype == torch.float32 else 5e-3)


def test_logits_shifted_by_200_change_nothing(backend: str) -> None:
    p = problem(0.1, torch.float32)
    plain = linear_kl(p.candidate, p.reference, p.head, options=KLOptions(backend=backend)).kl
    for shift in (-200.0, 200.0):
        shifted = on_device(Head(p.head.weight.clone(), bias=torch.full((RAGGED["v"],), shift)))
        kl = linear_kl(p.candidate, p.reference, shifted, p.head, KLOptions(backend=backend)).kl
        assert relative(kl, plain) <= 1e-3


def test_a_float32_model_with_a_16_bit_head(backend: str) -> None:
    p = problem(0.05, torch.float32)
    e = errors(p._replace(head=Head(p.head.weight.bfloat16())), KLOptions(backend=backend))
    assert e.kl <= 1e-3
    assert e.gradient <= 1e-3


def test_the_table_of_backends_picks_triton_on_a_gpu_alone() -> None:
    p = problem(0.1, torch.bfloat16)
    assert linear_kl(p.candidate, p.reference, p.head).backend == ("triton" if ON_GPU else "torch")
