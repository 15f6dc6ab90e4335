"""The oracle of scores: whole prompts through plain transformers, one at a time, all logits in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvopt.base.loading import Base
from kvopt.measure.score import TokenScores


def naive_scores(
    base: Base, prompts: Sequence[tuple[Sequence[int], Sequence[int]]], reference: Sequence[Tensor]
) -> TokenScores:
    """The scores of each pair.

    Args:
        base: the frozen model.
        prompts: (prompt ids, gold ids) of each row.
        reference: the reference's logits [gold tokens, V] of each row.
    """
    kl, nll, agree = [], [], []
    for (prompt, gold), logits in zip(prompts, reference, strict=True):
        log_q = naive_logits(base, prompt, gold).double().log_softmax(-1)
        log_p = logits.double().log_softmax(-1)
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1).float())
        nll.append(-log_q.gather(-1, torch.tensor(gold, device=log_q.device)[:, None])[:, 0].float())
        agree.append(log_q.argmax(-1) == log_p.argmax(-1))
    return TokenScores(
        torch.cat(kl), torch.cat(nll), torch.cat(agree), torch.tensor([len(gold) for _, gold in prompts])
    )


@torch.no_grad()
def naive_logits(base: Base, prompt: Sequence[int], gold: Sequence[int]) -> Tensor:
    """Logits [gold tokens, V] of plain transformers on the full prompt: no prefix, no padding, no kernels."""
    ids = torch.tensor([[*prompt, *gold][:-1]], device=base.device)
    return base.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]


def naive_attention_weights(base: Base, tokens: Sequence[int]) -> Tensor:
    """The attention weights [layers, heads, n, n] of one whole sequence, as transformers' eager attention has them."""
    before = base.model.config._attn_implementation
    base.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            weights = base.model(torch.tensor([list(tokens)]), output_attentions=True).attentions
    finally:
        base.model.set_attn_implementation(before)
    return torch.stack([layer[0] for layer in weights])
