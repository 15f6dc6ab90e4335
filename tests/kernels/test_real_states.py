"""The precision contract on hidden states of SmolLM2, whose logits are larger than those of random weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvopt.base.loading import Base
from kvopt.bench.real_states import RealStates, real_states
from kvopt.kernels import Head, KLOptions, linear_kl, linear_scores, moments_of, reference_facts
from kvopt.kernels.float64 import linear_kl64
from tests.kernels.cases import linear_scores64, relative

pytestmark = pytest.mark.slow

OURS = {
    "difference": KLOptions(),
    "difference, float32 products": KLOptions(products="float32"),
    "direct": KLOptions(form="direct"),
}


@pytest.fixture(scope="module")
def states(smollm2: Base) -> RealStates:
    return real_states(64, torch.float32, base=smollm2)


def in_dtype(states: RealStates, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor], Head]:
    """(reference, candidates, head); the nearest candidate equals the reference but for one feature in fifty."""
    kept = torch.rand(states.reference.shape, generator=torch.Generator().manual_seed(0)) < 0.98
    reference = states.reference.to(dtype)
    candidates = {name: x.to(dtype) for name, x in states.candidates.items()}
    near = torch.where(kept, reference, candidates["noise 0.001"])
    return reference, {"nearest": near, **candidates}, Head(states.head.weight.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_form_keeps_the_precision_contract(states: RealStates, dtype: torch.dtype) -> None:
    reference, candidates, head = in_dtype(states, dtype)
    sizes = []
    for name, candidate in candidates.items():
        exact = candidate.double().requires_grad_()
        kl64 = linear_kl64(exact, reference, head, head, KLOptions())
        (gradient64,) = torch.autograd.grad(kl64.sum(), exact)
        kl64 = kl64.detach()
        sizes.append(float(kl64.mean()))
        counted = (kl64 >= 1e-6) & (kl64 <= 10)
        for form, options in OURS.items():
            leaf = candidate.clone().requires_grad_()
            teacher = Head(head.weight.clone()) if options.form == "direct" else None
            kl = linear_kl(leaf, reference, head, teacher, options).kl
            (gradient,) = torch.autograd.grad(kl.sum(), leaf)
            error = ((kl.detach() - kl64) / kl64).abs()[counted]
            assert error.numel() == 0 or error.max() <= 1e-2, (name, form)
            if counted.any():
                assert relative(gradient[counted], gradient64[counted]) <= 1e-2, (name, form)
        leaf = candidate.clone().requires_grad_()
        kl = linear_kl(leaf, moments_of(reference, head), head).kl
        (gradient,) = torch.autograd.grad(kl.sum(), leaf)
        assert (kl.detach() - kl64).abs().max() <= 5e-5, name
        if counted.any():
            assert relative(gradient[counted], gradient64[counted]) <= 1e-2, (name, "moments")
    assert min(sizes) < 2e-5
    assert max(sizes) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_are_those_of_float64(states: RealStates, dtype: torch.dtype) -> None:
    reference, candidates, head = in_dtype(states, dtype)
    facts = reference_facts(reference, head)
    agreements = []
    for name, candidate in candidates.items():
        actual = linear_scores(candidate, reference, head, states.gold, facts=facts)
        expected = linear_scores64(candidate, reference, head, states.gold, KLOptions())
        limit = 1e-3 if dtype == torch.bfloat16 else 5e-5
        assert (actual.nll - expected.nll).abs().max() <= limit, name
        assert (actual.reference_nll - expected.reference_nll).abs().max() <= 5e-5, name
        assert torch.equal(actual.agree, expected.agree), name
        counted = expected.kl >= 1e-6
        error = ((actual.kl - expected.kl) / expected.kl).abs()[counted]
        assert error.numel() == 0 or error.max() <= 1e-2, name
        agreements.append(float(expected.agree.double().mean()))
    assert agreements[-1] < 1  # without the template some tokens differ
    same = linear_scores(reference, reference, head, states.gold, facts=facts)
    assert same.kl.abs().max() == 0
    assert same.agree.all()
