"""Logits of 16-bit heads: float32 sums, so that losses, choices and draws do not depend on rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvopt.kernels import Head
from kvopt.kernels.float64 import logits64
from kvopt.train.gold_tokens import Gold


def states(dtype: torch.dtype, rows: int = 40, width: int = 64, vocabulary: int = 9000) -> tuple[Tensor, Head]:
    """Hidden states and a head whose logits reach some 30 nats, as those of trained models do."""
    generator = torch.Generator().manual_seed(5)
    hidden = 3 * torch.randn(rows, width, generator=generator)
    weight, bias = torch.randn(vocabulary, width, generator=generator), torch.randn(vocabulary, generator=generator)
    return hidden.to(dtype), Head(weight.to(dtype), bias.to(dtype), scale=0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_are_not_rounded_to_the_dtype_of_the_head(dtype: torch.dtype) -> None:
    hidden, head = states(dtype)
    exact = logits64(hidden, head, 1.0)
    assert exact.abs().max() > 30
    logits = head.logits(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=0, atol=1e-4)


def test_a_near_tie_falls_as_the_exact_logits_say() -> None:
    hidden, head = states(torch.bfloat16, vocabulary=200)
    best = logits64(hidden, head, 1.0).argmax(-1)
    twins = head.weight[best].clone()
    twins[:, 0] -= 0.02 * torch.sign(hidden[:, 0]) * twins[:, 0].abs().clamp_min(0.5)
    both = Head(torch.cat([twins, head.weight]), torch.cat([head.bias[best], head.bias]), scale=0.5)
    exact = logits64(hidden, both, 1.0)
    rounded = torch.nn.functional.linear(hidden, both.weight, both.bias)
    assert (rounded.argmax(-1) != exact.argmax(-1)).any(), "16-bit sums do not fall as these do"
    assert torch.equal(both.logits(hidden).argmax(-1), exact.argmax(-1))
    assert torch.equal(both.most_likely(hidden), exact.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_most_likely_token_is_that_of_all_logits(dtype: torch.dtype) -> None:
    hidden, head = states(dtype, rows=300)
    assert torch.equal(head.most_likely(hidden), logits64(hidden, head, 1.0).argmax(-1))
    for softcap in (30.0, 0.5):
        capped = Head(head.weight, scale=0.5, softcap=softcap, vocab=8000)
        assert torch.equal(capped.most_likely(hidden), capped.logits(hidden).argmax(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk_bytes", [2**28, 4 * 9000 * 7])
def test_a_students_loss_in_16_bits_is_that_of_float32(dtype: torch.dtype, chunk_bytes: int) -> None:
    hidden, head = states(dtype)
    gold = torch.arange(len(hidden)) * 200
    leaf = hidden.clone().requires_grad_(True)
    log_probs = Gold(leaf, gold, head, chunk_bytes=chunk_bytes).log_probs()
    log_probs.mean().backward()
    wide = hidden.double().requires_grad_(True)
    expected = logits64(wide, head, 1.0).log_softmax(-1)[torch.arange(len(gold)), gold]
    expected.mean().backward()
    torch.testing.assert_close(log_probs.double(), expected.detach(), rtol=0, atol=1e-3)
    scale = float(wide.grad.abs().max())
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=0.01, atol=0.01 * scale)


def test_autocast_rounds_states_and_head_but_not_the_sums() -> None:
    hidden, head = states(torch.float32)
    rounded = Head(head.weight.bfloat16(), None, scale=0.5)
    expected = logits64(hidden.bfloat16(), rounded, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = Head(head.weight, None, scale=0.5).logits(hidden)
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-4)
