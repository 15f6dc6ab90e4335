"""The divergence in float64, written as in a textbook: the yardstick for every other backend. N x V memory, slow."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvopt.kernels.options import Head, KLOptions


def logits64(hidden: Tensor, head: Head, temperature: float) -> Tensor:
    """[N, V] float64 logits, differentiable."""
    z = hidden.double() @ head.rows.double().T
    if head.offsets is not None:
        z = z + head.offsets.double()
    z = z * head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z / temperature


def divergence64(log_p: Tensor, log_q: Tensor, options: KLOptions) -> Tensor:
    """[N]: the divergence of each row from float64 log-probabilities [N, V]."""
    p, q = log_p.exp(), log_q.exp()
    if options.divergence == "forward":
        return (p * (log_p - log_q)).sum(-1)
    if options.divergence == "reverse":
        return (q * (log_q - log_p)).sum(-1)
    beta = options.beta
    log_m = torch.logaddexp(log_p + torch.tensor(beta).double().log(), log_q + torch.tensor(1 - beta).double().log())
    return (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(-1)


def linear_kl64(
    candidate_hidden: Tensor, reference_hidden: Tensor, head: Head, reference_head: Head, options: KLOptions
) -> Tensor:
    """[N] float64 per-token divergence, differentiable by autograd in candidate_hidden and head; p is a constant."""
    with torch.no_grad():
        log_p = logits64(reference_hidden, reference_head, options.temperature).log_softmax(-1)
    log_q = logits64(candidate_hidden, head, options.temperature).log_softmax(-1)
    return divergence64(log_p, log_q, options)


class Scores64(NamedTuple):
    kl: Tensor
    nll: Tensor
    reference_nll: Tensor
    agree: Tensor
    entropy: Tensor


@torch.no_grad()
def linear_scores64(
    candidate_hidden: Tensor, reference_hidden: Tensor, head: Head, gold_ids: Tensor, options: KLOptions
) -> Scores64:
    """[N] each, float64 (agree: bool); negative log-likelihoods are those of the gold ids."""
    log_p = logits64(reference_hidden, head, options.temperature).log_softmax(-1)
    log_q = logits64(candidate_hidden, head, options.temperature).log_softmax(-1)
    gold = gold_ids[:, None]
    return Scores64(
        divergence64(log_p, log_q, options),
        -log_q.gather(1, gold)[:, 0],
        -log_p.gather(1, gold)[:, 0],
        log_p.argmax(-1) == log_q.argmax(-1),
        -(log_p.exp() * log_p).sum(-1),
    )
