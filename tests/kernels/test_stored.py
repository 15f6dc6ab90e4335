import pytest
import torch

from kvopt.kernels import Head, KernelInputError, KLOptions, TopK, UnsupportedError, linear_kl, moments_of
from kvopt.kernels.divergences import divergences
from kvopt.kernels.float64 import linear_kl64, logits64
from tests.kernels.cases import DIVERGENCES, problem, relative


def stored_as(form: str) -> list[str]:
    """Divergences that a stored reference of this form gives."""
    return [name for name, divergence in divergences().items() if form in divergence.stored_forms]


@pytest.mark.parametrize("distance", [5e-4, 0.016, 0.16, 1.4])
@pytest.mark.parametrize("divergence", stored_as("moments"))
def test_moments_give_the_gradient_at_any_size_and_the_value_to_1e5_nats(divergence, distance):
    p = problem(distance, torch.float32)
    head = Head(p.head.weight, torch.randn(5003), scale=0.8)
    options = KLOptions(divergence=divergence, temperature=1.2)
    candidate, expected = p.candidate.clone().requires_grad_(), p.candidate.double().requires_grad_()
    out = linear_kl(candidate, moments_of(p.reference, head, options=options), head, options=options)
    kl64 = linear_kl64(expected, p.reference, head, head, options)
    out.kl.sum().backward()
    kl64.sum().backward()
    assert out.form == "moments"
    assert (out.kl - kl64).abs().max() < 2e-5
    assert relative(candidate.grad, expected.grad) <= 1e-2


def test_moments_of_another_model_need_its_head_only_once():
    p, other = problem(0.5, torch.bfloat16), problem(0.5, torch.bfloat16, d=64, seed=3)
    kl = linear_kl(p.candidate, moments_of(other.reference, p.head, other.head), p.head).kl
    assert relative(kl, linear_kl64(p.candidate, other.reference, p.head, other.head, KLOptions())) <= 1e-4


def test_scaled_dot_product_attention_agrees_with_the_mean_weight():
    p = problem(0.1, torch.float32)
    oracle = torch.nn.functional.scaled_dot_product_attention(
        p.reference[None], p.head.weight[None], p.head.weight[None], scale=1.0
    )[0]
    assert relative(moments_of(p.reference, p.head).mean_weight, oracle) <= 1e-5


@pytest.mark.parametrize("softcap", [None, 6.0])
@pytest.mark.parametrize("k", [1, 64])
@pytest.mark.parametrize("divergence", stored_as("top-k"))
def test_top_k_is_the_divergence_of_k_tokens_and_a_tail_and_never_above_the_truth(divergence, k, softcap):
    options = KLOptions(divergence=divergence)
    p = problem(0.3 if softcap is None else 3.0, torch.float32, softcap=softcap)
    log_p = logits64(p.reference, p.head, 1.0).log_softmax(-1)
    top = log_p.topk(k, -1)
    candidate, expected = p.candidate.clone().requires_grad_(), p.candidate.double().requires_grad_()
    out = linear_kl(candidate, TopK(top.indices, top.values.float()), p.head, options=options)
    chosen = logits64(expected, p.head, 1.0).log_softmax(-1).gather(1, top.indices)
    with_tail = (torch.cat([log, (1 - log.exp().sum(-1, keepdim=True)).log()], 1) for log in (top.values, chosen))
    buckets = options.formula.exact(*with_tail)
    out.kl.sum().backward()
    buckets.sum().backward()
    assert relative(out.kl, buckets) <= 1e-4
    assert relative(candidate.grad, expected.grad) <= 1e-3
    assert (out.kl <= linear_kl64(p.candidate, p.reference, p.head, p.head, options) + 1e-5).all()


def test_masks_drop_tokens_of_stored_references():
    p = problem(0.3, torch.float32)
    mask = torch.arange(37) % 3 > 0
    stored = moments_of(p.reference, p.head)
    masked, plain = linear_kl(p.candidate, stored, p.head, mask=mask).kl, linear_kl(p.candidate, stored, p.head).kl
    assert torch.allclose(masked, plain * mask, atol=1e-5)


def test_what_stored_references_cannot_do_names_what_can():
    p = problem(0.3, torch.float32)
    stored, top = moments_of(p.reference, p.head), TopK(torch.zeros(37, 1).long(), torch.zeros(37, 1))
    for reference, form in ((stored, "moments"), (top, "top-k")):
        for divergence in set(DIVERGENCES) - set(stored_as(form)):
            with pytest.raises(UnsupportedError, match=r"gives forward KL.* only, .*store the reference hidden states"):
                linear_kl(p.candidate, reference, p.head, options=KLOptions(divergence=divergence))
    with pytest.raises(UnsupportedError, match="softcap"):
        moments_of(p.reference, Head(p.head.weight, softcap=30.0))
    with pytest.raises(KernelInputError, match="belong to temperature"):
        linear_kl(p.candidate, stored, p.head, options=KLOptions(temperature=2.0))
    with pytest.raises(UnsupportedError, match="moments_of"):
        linear_kl(p.candidate, p.reference, p.head, options=KLOptions(form="moments"))
