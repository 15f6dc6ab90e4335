import pytest
import torch

from kvopt.kernels import Head, KernelInputError, KLOptions, linear_kl, linear_scores, reference_facts, scores
from kvopt.kernels.plan import cpu_has_bfloat16_products
from tests.kernels.cases import DIVERGENCES, Problem, linear_scores64, problem, relative

NAMES = ("kl", "nll", "reference_nll", "entropy")


def gold_ids(p: Problem) -> torch.Tensor:
    """Random tokens, and for every third position the reference's likeliest."""
    gold = torch.randint(0, p.head.size, (len(p.candidate),), generator=torch.Generator().manual_seed(2))
    likely = (p.reference.double() @ p.head.rows.double().T).argmax(-1)
    return torch.where(torch.arange(len(gold)) % 3 == 0, likely, gold)


@pytest.fixture
def bfloat16_products(monkeypatch):
    """As on a CPU that multiplies bfloat16 matrices fast, on any CPU."""
    from kvopt.kernels import plan

    monkeypatch.setattr(plan, "cpu_has_bfloat16_products", lambda: True)


@pytest.mark.parametrize("given", [False, True], ids=["facts-made-here", "facts-given"])
@pytest.mark.parametrize("softcap", [None, 15.0])
@pytest.mark.parametrize("distance", [0.02, 0.3, 1.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_agree_with_float64(dtype, distance, softcap, given, bfloat16_products):
    p = problem(distance, dtype, softcap=softcap)
    head = Head(p.head.weight, torch.randn(5003), scale=0.9, softcap=softcap, vocab=5001)
    gold, options = gold_ids(p._replace(head=head)), KLOptions(chunk_bytes=2**20, temperature=1.1)
    facts = reference_facts(p.reference, head, options) if given else None
    actual = linear_scores(p.candidate, p.reference, head, gold, options, facts=facts)
    expected = linear_scores64(p.candidate, p.reference, head, gold, options)
    for name in NAMES:
        limit = 1e-5 if dtype == torch.float32 or name in ("reference_nll", "entropy") else 1e-3
        assert (getattr(actual, name).double() - getattr(expected, name)).abs().max() < limit, name
    assert torch.equal(actual.agree, expected.agree)
    assert ((actual.kl - expected.kl) / expected.kl).abs().max() < 1e-2


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_are_those_of_the_loss(divergence, bfloat16_products):
    p, options = problem(0.1, torch.bfloat16), KLOptions(divergence=divergence, beta=0.3)
    actual = linear_scores(p.candidate, p.reference, p.head, gold_ids(p), options)
    expected = linear_scores64(p.candidate, p.reference, p.head, gold_ids(p), options)
    assert ((actual.kl - expected.kl) / expected.kl).abs().max() < 1e-2
    assert (actual.nll - expected.nll).abs().max() < 1e-3


def test_heads_of_other_sizes_are_scored_and_agreement_differs_between_tokens():
    p, other = problem(0.5, torch.float32), problem(0.5, torch.float32, d=64, seed=3)
    twisted = Head(other.head.weight.clone())
    gold = gold_ids(p)
    for candidate, reference, teacher in ((p.candidate, p.reference, p.head), (p.candidate, other.reference, twisted)):
        actual = linear_scores(candidate, reference, p.head, gold, reference_head=teacher)
        again = linear_scores(
            candidate,
            reference,
            p.head,
            gold,
            reference_head=teacher,
            facts=reference_facts(reference, teacher),
        )
        nll64 = -(candidate.double() @ p.head.weight.double().T).log_softmax(-1).gather(1, gold[:, None])[:, 0]
        assert (actual.nll - nll64).abs().max() < 2e-5
        assert relative(again.nll, actual.nll) < 1e-5
        assert relative(again.kl, actual.kl) < 1e-5
    assert 0 < linear_scores(p.candidate, p.reference, p.head, gold).agree.sum() < 37


def test_equal_hidden_states_score_exactly_zero_and_agree(bfloat16_products):
    for dtype in (torch.float32, torch.bfloat16):
        p = problem(0.0, dtype)
        actual = linear_scores(p.candidate, p.reference, p.head, gold_ids(p))
        assert actual.kl.abs().max() == 0
        assert torch.equal(actual.nll, actual.reference_nll)
        assert actual.agree.all()


def test_agreement_is_exact_where_rounding_hides_the_likeliest_token(bfloat16_products):
    """Many tokens within one bfloat16 step of the top: more than are refined, so the row is computed in float32."""
    torch.manual_seed(0)
    p = problem(0.002, torch.bfloat16, n=40, v=4000)
    near = p.head.weight[:1] + 1.5e-3 * torch.randn(4000, 96)
    weight = torch.cat([p.head.weight[1:1000], near.to(torch.bfloat16)])
    reference = (p.head.weight[0].float() * 4 + 2 * torch.randn(40, 96)).to(torch.bfloat16)
    candidate = (reference.float() + 2 * torch.randn(40, 96)).to(torch.bfloat16)
    head, gold = Head(weight), torch.zeros(40, dtype=torch.int64)
    expected = linear_scores64(candidate, reference, head, gold, KLOptions())
    assert 0 < expected.agree.sum() < 40
    assert torch.equal(linear_scores(candidate, reference, head, gold).agree, expected.agree)


def test_the_likeliest_token_of_a_flat_candidate_need_not_be_likely_under_the_reference(bfloat16_products):
    p = problem(0.5, torch.bfloat16, n=200)
    head, gold = Head(p.head.weight * 0.1), torch.zeros(200, dtype=torch.int64)
    expected = linear_scores64(p.candidate, p.reference, head, gold, KLOptions())
    assert expected.kl.max() < scores.NLL_LIMIT
    assert 0 < expected.agree.sum() < 200
    assert torch.equal(linear_scores(p.candidate, p.reference, head, gold).agree, expected.agree)


def test_large_divergences_are_computed_exactly_and_small_ones_are_not_repeated(bfloat16_products, monkeypatch):
    calls = []
    original = scores._Job._score

    def spy(self, plan, rows):
        calls.append((plan.rounded, len(rows)))
        return original(self, plan, rows)

    monkeypatch.setattr(scores._Job, "_score", spy)
    small, large = problem(0.02, torch.bfloat16, n=300), problem(1.4, torch.bfloat16, n=300)
    linear_scores(small.candidate, small.reference, small.head, gold_ids(small))
    assert calls == [(True, 75), (True, 225), (False, 0)]
    calls.clear()
    linear_scores(large.candidate, large.reference, large.head, gold_ids(large))
    assert calls == [(True, 75), (False, 300)]
    calls.clear()
    mixed = torch.where(torch.arange(300)[:, None] % 5 == 0, large.candidate, small.reference)
    linear_scores(mixed, small.reference, small.head, gold_ids(small))
    assert calls == [(True, 75), (True, 225), (False, 60)]


@pytest.mark.parametrize(
    "options", [None, KLOptions(divergence="jsd", beta=0.1), KLOptions(divergence="jsd", beta=0.5)]
)
def test_the_same_rows_are_computed_again_whatever_the_divergence_is(options, bfloat16_products, monkeypatch):
    again = []
    original = scores._Job._score

    def spy(self, plan, rows):
        if not plan.rounded:
            again.append(sorted(rows.tolist()))
        return original(self, plan, rows)

    monkeypatch.setattr(scores._Job, "_score", spy)
    near, over = (problem(distance, torch.bfloat16, n=300) for distance in (0.02, 0.2))
    mixed = torch.where(torch.arange(300)[:, None] % 5 == 0, over.candidate, near.reference)
    forward = linear_scores(mixed, near.reference, near.head, gold_ids(near)).kl
    assert 0.03 < forward[::5].min() < forward[::5].max() < 0.4, "over the limit, and a divergence of that size is not"
    linear_scores(mixed, near.reference, near.head, gold_ids(near), options)
    assert again == [list(range(0, 300, 5))] * 2


def test_the_loss_and_the_scores_are_the_same_divergence():
    p = problem(0.3, torch.bfloat16)
    kl = linear_kl(p.candidate, p.reference, p.head).kl
    assert torch.allclose(linear_scores(p.candidate, p.reference, p.head, gold_ids(p)).kl, kl, rtol=2e-2)
    assert isinstance(cpu_has_bfloat16_products(), bool)


def test_no_tokens_and_what_does_not_fit():
    p = problem(0.1, torch.bfloat16, n=0)
    assert linear_scores(p.candidate, p.reference, p.head, torch.zeros(0, dtype=torch.int64)).kl.shape == (0,)
    with pytest.raises(KernelInputError, match="int64"):
        linear_scores(p.candidate, p.reference, p.head, torch.zeros(0))
    p = problem(0.1, torch.float32, n=4)
    with pytest.raises(KernelInputError, match="facts are of 3 tokens"):
        linear_scores(p.candidate, p.reference, p.head, gold_ids(p), facts=reference_facts(p.reference[:3], p.head))
