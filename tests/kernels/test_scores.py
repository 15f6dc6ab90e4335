import pytest
import torch

from kvopt.kernels import KernelInputError, KLOptions, linear_kl, linear_scores
from kvopt.kernels.reference import linear_scores64
from tests.kernels.cases import problem


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 15.0])
def test_scores_agree_with_float64(dtype, softcap):
    p = problem(0.3, dtype, softcap=softcap)
    gold = torch.randint(0, 5003, (37,), generator=torch.Generator().manual_seed(2))
    options = KLOptions(chunk_bytes=2**20)
    scores, expected = linear_scores(p.candidate, p.reference, p.head, gold, options), None
    expected = linear_scores64(p.candidate, p.reference, p.head, gold, options)
    for name in ("kl", "nll", "reference_nll", "entropy"):
        assert (getattr(scores, name).double() - getattr(expected, name)).abs().max() < 1e-4
    assert torch.equal(scores.agree, expected.agree)
    assert 0 < scores.agree.sum() < 37
    assert torch.allclose(scores.kl, linear_kl(p.candidate, p.reference, p.head).kl, rtol=2e-2)


def test_equal_hidden_states_score_exactly_zero_and_agree():
    p = problem(0.0, torch.bfloat16)
    scores = linear_scores(p.candidate, p.reference, p.head, torch.zeros(37, dtype=torch.int64))
    assert scores.kl.abs().max() == 0
    assert torch.equal(scores.nll, scores.reference_nll)
    assert scores.agree.all()


def test_no_tokens_and_wrong_gold_ids():
    p = problem(0.1, torch.float32, n=0)
    assert linear_scores(p.candidate, p.reference, p.head, torch.zeros(0, dtype=torch.int64)).kl.shape == (0,)
    with pytest.raises(KernelInputError, match="int64"):
        linear_scores(p.candidate, p.reference, p.head, torch.zeros(0))
