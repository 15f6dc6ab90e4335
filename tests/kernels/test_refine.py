"""The likeliest tokens of rounded logits: found among all columns, and made exact in place."""

from __future__ import annotations

import pytest
import torch

from kvopt.kernels import Head
from kvopt.kernels.refine import TOP, refine_, top_tokens
from tests.kernels.cases import problem


@pytest.mark.parametrize("vocabulary", [5, 16, 17, 900, 4096, 5003, 5055])
def test_the_largest_columns_are_found_wherever_they_are(vocabulary):
    logits = torch.randn(40, vocabulary, generator=torch.Generator().manual_seed(0))
    logits[0, -TOP:] += 10  # columns behind the last whole group
    logits[1, ::64] += 10  # columns of one group
    ids, floor = top_tokens(logits)
    order = logits.sort(-1, descending=True)
    count = min(TOP, vocabulary)
    assert torch.equal(ids.sort(-1).values, order.indices[:, :count].sort(-1).values)
    rest = order.values[:, count:]
    assert torch.equal(floor, order.values[:, count - 1]) if rest.numel() else (floor == float("-inf")).all()


def test_both_logits_of_likely_and_of_asked_tokens_become_exact():
    p = problem(0.3, torch.bfloat16)
    head = Head(p.head.weight, torch.randn(5003), scale=0.7)
    difference = p.candidate.float() - p.reference.float()
    z = (p.reference.float() @ head.weight.float().T + head.bias) * head.scale
    u = difference @ head.weight.float().T * head.scale
    rounded_z, rounded_u = z.bfloat16().float(), u.bfloat16().float()
    extra = torch.arange(37)
    refined = refine_(rounded_z, rounded_u, head, p.reference, difference, extra, candidate_too=True)
    best = torch.cat([z.argmax(-1, keepdim=True), (z + u).argmax(-1, keepdim=True), extra[:, None]], 1)
    for exact, actual in ((z, rounded_z), (u, rounded_u)):
        assert (exact - actual).gather(1, best).abs().max() <= 2e-5
        assert (exact - actual).gather(1, refined.tokens).abs().max() <= 2e-5
        assert (exact - actual).abs().max() > 1e-3  # the others stay as they were
    same, certain = refined.agreement()
    assert torch.equal(same[certain], (z.argmax(-1) == (z + u).argmax(-1))[certain])
    assert certain.any()
