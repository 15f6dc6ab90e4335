from dataclasses import replace

import pytest
import torch

from kvopt.kernels import Head, KernelInputError, KLOptions, UnsupportedError, linear_kl, products, torch_backend
from kvopt.kernels.float64 import linear_kl64
from kvopt.kernels.plan import make_plan
from tests.kernels.cases import DISTANCE_FOR_KL, DIVERGENCES, Problem, errors, problem, relative

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL_CHUNKS = 2**20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("distance", DISTANCE_FOR_KL.values())
def test_precision_contract_holds_from_tiny_to_large_divergence(dtype, divergence, distance):
    e = errors(problem(distance, dtype), KLOptions(divergence=divergence, chunk_bytes=SMALL_CHUNKS))
    assert e.kl <= 1e-2
    assert e.gradient <= 1e-2


@pytest.mark.parametrize("distance", DISTANCE_FOR_KL.values())
def test_direct_form_keeps_the_contract(distance):
    e = errors(problem(distance, torch.bfloat16), KLOptions(form="direct"))
    assert e.kl <= 1e-2
    assert e.gradient <= 1e-2


def test_bfloat16_logits_as_large_as_real_ones_keep_the_contract():
    p = problem(0.02, torch.bfloat16, v=20011)
    p = p._replace(head=Head(p.head.weight * 3))  # logits up to 40: rounded to bfloat16 they are off by up to 0.125
    e = errors(p, KLOptions())
    assert e.kl <= 1e-2
    assert e.gradient <= 1e-2


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_bias_scale_softcap_and_temperature_enter_as_in_the_formula(softcap):
    p = problem(0.05, torch.float32)
    head = Head(p.head.weight, bias=torch.randn(5003), scale=0.7, softcap=softcap)
    for form in ("difference", "direct"):
        e = errors(p._replace(head=head), KLOptions(form=form, temperature=1.7))
        assert e.kl <= 1e-3
        assert e.gradient <= 1e-4


def test_equal_hidden_states_give_exactly_zero_and_a_zero_gradient():
    for dtype in DTYPES:
        p = problem(0.0, dtype)
        candidate = p.candidate.clone().requires_grad_()
        out = linear_kl(candidate, p.reference, p.head)
        out.loss.backward()
        assert out.kl.abs().max() == 0
        assert candidate.grad.abs().max() == 0


@pytest.mark.parametrize("shift", [-200.0, -30.0, 30.0, 200.0])
def test_a_constant_added_to_all_logits_of_one_model_changes_nothing(shift):
    p = problem(0.1, torch.float32)
    plain = linear_kl(p.candidate, p.reference, p.head, Head(p.head.weight.clone())).kl
    shifted_head = Head(p.head.weight, bias=torch.full((5003,), shift))
    shifted = linear_kl(p.candidate, p.reference, shifted_head, Head(p.head.weight)).kl
    assert relative(shifted, plain) <= 1e-3


def test_padded_vocabulary_takes_no_part():
    p = problem(0.1, torch.float32)
    junk = torch.full((61, 96), 1e4)
    padded = Head(torch.cat([p.head.weight, junk]), vocab=5003)
    a, b = (p.candidate.clone().requires_grad_() for _ in range(2))
    out, plain = linear_kl(a, p.reference, padded), linear_kl(b, p.reference, p.head)
    out.loss.backward()
    plain.loss.backward()
    assert torch.equal(out.kl, plain.kl)
    assert torch.equal(a.grad, b.grad)


def test_masked_tokens_change_nothing_even_when_they_hold_nan():
    p = problem(0.1, torch.float32)
    mask = torch.rand(37, generator=torch.Generator().manual_seed(1)) > 0.4
    spoiled = torch.where(mask[:, None], p.candidate, torch.tensor(float("nan"))).requires_grad_()
    clean = p.candidate[mask].clone().requires_grad_()
    out = linear_kl(spoiled, p.reference, p.head, mask=mask)
    expected = linear_kl(clean, p.reference[mask], p.head)
    out.loss.backward()
    expected.loss.backward()
    assert torch.allclose(out.kl[mask], expected.kl, rtol=1e-4)
    assert out.kl[~mask].abs().max() == 0
    assert relative(spoiled.grad[mask], clean.grad) <= 1e-5
    assert spoiled.grad[~mask].abs().max() == 0


def test_weights_scale_the_loss_and_per_token_upstream_gradients_are_used():
    p = problem(0.1, torch.float32)
    weights = torch.rand(37)
    candidate = p.candidate.clone().requires_grad_()
    out = linear_kl(candidate, p.reference, p.head, weights=weights)
    assert out.loss.item() == pytest.approx(((out.kl * weights).sum() / weights.sum()).item(), rel=1e-5)
    out.loss.backward()
    c64 = p.candidate.double().requires_grad_()
    kl64 = linear_kl64(c64, p.reference, p.head, p.head, KLOptions())
    ((kl64 * weights).sum() / weights.sum()).backward()
    assert relative(candidate.grad, c64.grad) <= 1e-4
    total = linear_kl(p.candidate, p.reference, p.head, options=KLOptions(reduction="sum"), weights=weights).loss
    assert total.item() == pytest.approx((out.kl * weights).sum().item(), rel=1e-5)


def test_chunk_size_does_not_matter_and_results_repeat_bit_for_bit():
    p = problem(0.1, torch.float32, n=113)
    small, again, large = (
        linear_kl(p.candidate, p.reference, p.head, options=KLOptions(chunk_bytes=size)).kl
        for size in (2**20, 2**20, 2**28)
    )
    assert torch.equal(small, again)
    assert relative(small, large) <= 1e-5


def test_different_heads_and_hidden_sizes():
    p = problem(0.5, torch.float32)
    other = problem(0.5, torch.float32, d=64, seed=3)
    e = errors(Problem(p.candidate, other.reference, p.head), KLOptions(), other.head)
    assert e.kl <= 1e-4
    assert e.gradient <= 1e-5


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck_in_float64(divergence, trained):
    torch.manual_seed(0)
    weight, bias = torch.randn(7, 4).double(), torch.randn(7).double()
    hidden, reference = torch.randn(3, 4).double().requires_grad_(), torch.randn(3, 4).double()
    teacher = Head(weight.clone() + 0.1)
    options = KLOptions(divergence=divergence, beta=0.3, temperature=1.5)
    for softcap in (None, 3.0):

        def kl(h, w, b, softcap=softcap):
            return linear_kl(h, reference, Head(w, b, scale=0.8, softcap=softcap), teacher, options).kl

        inputs = (hidden, weight.requires_grad_(trained), bias.requires_grad_(trained))
        assert torch.autograd.gradcheck(kl, inputs)


def test_gradient_of_a_shared_trained_head_treats_the_reference_as_constant():
    p = problem(0.1, torch.float32, n=9, v=301)
    weight = p.head.weight.clone().requires_grad_()
    linear_kl(p.candidate, p.reference, Head(weight, vocab=299)).loss.backward()
    w64 = p.head.weight.double().requires_grad_()
    head64 = Head(w64, vocab=299)
    linear_kl64(p.candidate, p.reference, head64, head64, KLOptions()).mean().backward()
    assert relative(weight.grad, w64.grad) <= 1e-4
    assert weight.grad[299:].abs().max() == 0


def test_a_frozen_head_gets_no_gradient_and_a_constant_candidate_costs_no_gradient():
    p = problem(0.1, torch.float32)
    candidate = p.candidate.clone().requires_grad_()
    linear_kl(candidate, p.reference, p.head).loss.backward()
    assert p.head.weight.grad is None
    assert not linear_kl(p.candidate, p.reference, p.head).kl.requires_grad


@pytest.mark.parametrize("n", [0, 1])
def test_no_token_and_one_token(n):
    p = problem(0.1, torch.float32, n=n)
    candidate = p.candidate.clone().requires_grad_()
    out = linear_kl(candidate, p.reference, p.head)
    out.loss.backward()
    assert out.kl.shape == (n,)
    assert candidate.grad.shape == candidate.shape


def test_all_tokens_masked_gives_a_zero_loss_and_a_zero_gradient():
    p = problem(0.1, torch.bfloat16)
    candidate = p.candidate.clone().requires_grad_()
    out = linear_kl(candidate, p.reference, p.head, mask=torch.zeros(37, dtype=torch.bool))
    out.loss.backward()
    assert out.loss == 0
    assert candidate.grad.abs().max() == 0


def test_non_contiguous_inputs_and_autocast_give_the_same_result():
    p = problem(0.01, torch.float32)
    candidate, reference = p.candidate.T.contiguous().T, torch.cat([p.reference, p.reference], 1)[:, :96]
    plain = linear_kl(p.candidate, p.reference, p.head).kl
    assert torch.allclose(linear_kl(candidate, reference, p.head).kl, plain, rtol=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_kl(p.candidate, p.reference, p.head).kl, plain)


def test_a_compiled_caller_gets_the_same_gradient():
    p = problem(0.1, torch.float32, n=5, v=301)

    def loss(h):
        return linear_kl(h * 1.5, p.reference * 1.5, p.head).loss * 2

    compiled = torch.compile(loss, backend="aot_eager")
    a, b = (p.candidate.clone().requires_grad_() for _ in range(2))
    compiled(a).backward()
    loss(b).backward()
    assert torch.allclose(a.grad, b.grad)


def test_divergences_beyond_any_float32_range_stay_finite():
    p = problem(0.0, torch.float32)
    candidate = (-60 * p.candidate).requires_grad_()
    out = linear_kl(candidate, 60 * p.reference, p.head)
    out.loss.backward()
    expected = linear_kl64(candidate, 60 * p.reference, p.head, p.head, KLOptions())
    assert torch.isfinite(candidate.grad).all()
    assert relative(out.kl, expected) <= 1e-4


def test_rows_fall_back_to_eager_when_compiling_fails(monkeypatch):
    from kvopt.kernels import rows

    def broken(*args, **kwargs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(rows, "_compiled", {})
    monkeypatch.setattr(torch, "compile", broken)
    p = problem(0.1, torch.float32)
    with pytest.warns(UserWarning, match="no compiler here"):
        kl = linear_kl(p.candidate, p.reference, p.head, options=KLOptions(rows="compiled")).kl
    assert torch.equal(kl, linear_kl(p.candidate, p.reference, p.head).kl)
    assert rows.row_function("compiled") is rows.divergence_rows


def test_the_result_says_which_form_and_backend_were_used():
    p = problem(0.1, torch.float32)
    assert linear_kl(p.candidate, p.reference, p.head).form == "difference"
    assert linear_kl(p.candidate, p.reference, p.head, Head(p.head.weight.clone())).form == "direct"
    assert linear_kl(p.candidate, p.reference, p.head, options=KLOptions(backend="reference")).backend == "reference"


def test_what_does_not_fit_is_refused_by_name():
    p = problem(0.1, torch.float32)
    with pytest.raises(KernelInputError, match=r"96 features and reference_head.weight 64"):
        linear_kl(p.candidate, p.reference, p.head, Head(torch.randn(5003, 64)))
    with pytest.raises(KernelInputError, match="Head\\(vocab"):
        linear_kl(p.candidate, p.reference, p.head, Head(torch.randn(5004, 96)))
    with pytest.raises(UnsupportedError, match='use form="direct"'):
        linear_kl(p.candidate, p.reference, p.head, Head(p.head.weight.clone()), KLOptions(form="difference"))
    with pytest.raises(KernelInputError, match=r"mask is torch\.float32"):
        linear_kl(p.candidate, p.reference, p.head, mask=torch.ones(37))
    with pytest.raises(KernelInputError, match='divergence="forward" or "reverse"'):
        KLOptions(divergence="jsd", beta=0.0)
    with pytest.raises(KernelInputError, match="choose one of"):
        KLOptions(form="differences")


@pytest.mark.parametrize("softcap", [None, 9.0])
def test_a_trained_head_sums_its_gradients_over_chunks(softcap):
    p = problem(0.3, torch.float32, n=90)
    bias, upstream = torch.randn(5003), torch.rand(90)
    grads = []
    for dtype in (torch.float32, torch.float64):
        h, w, b = (t.to(dtype).clone().requires_grad_() for t in (p.candidate, p.head.weight, bias))
        head = Head(w, b, scale=0.8, softcap=softcap)
        options = KLOptions(temperature=1.3, chunk_bytes=SMALL_CHUNKS)  # 26 tokens at a time
        if dtype == torch.float32:
            kl = linear_kl(h, p.reference, head, options=options).kl
        else:
            kl = linear_kl64(h, p.reference, head, head, options)
        (kl * upstream).sum().backward()
        grads.append((h.grad, w.grad, b.grad))
    for ours, theirs in zip(*grads, strict=True):
        assert relative(ours, theirs) <= 1e-4


@pytest.mark.parametrize("distance", DISTANCE_FOR_KL.values())
def test_float16_gradients_do_not_underflow_where_products_take_them(distance):
    """As on a GPU: operands of products in float16, their sums in float32."""
    p = problem(distance, torch.float16)
    plan = replace(make_plan(p.candidate, p.reference, p.head, p.head, KLOptions()), product=torch.float16)
    value, gradient = torch_backend.value_and_hidden_gradient(plan, p.candidate, p.reference, True)
    exact = p.candidate.double().requires_grad_()
    kl64 = linear_kl64(exact, p.reference, p.head, p.head, KLOptions())
    kl64.sum().backward()
    assert ((value - kl64) / kl64).abs().max() <= 5e-3
    assert relative(gradient, exact.grad) <= 5e-3


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_are_computed_again_at_the_same_distance_whatever_the_divergence(divergence):
    p, options = problem(0.01, torch.float64), KLOptions(divergence=divergence, beta=0.3)
    kl, value = (linear_kl64(p.candidate, p.reference, p.head, p.head, o).mean() for o in (KLOptions(), options))
    assert options.formula.at_kl(float(kl)) == pytest.approx(float(value), rel=0.1)


def test_a_16_bit_head_larger_than_one_block_is_converted_block_by_block(monkeypatch):
    monkeypatch.setattr(products, "VOCABULARY_BLOCK", 700)
    e = errors(problem(0.1, torch.bfloat16), KLOptions(form="direct"))
    assert e.kl <= 1e-3
    assert e.gradient <= 3e-3
