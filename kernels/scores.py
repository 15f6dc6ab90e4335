"""One pass over the logits for everything a context is scored by: KL, gold NLL, top-1 agreement, entropy."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvopt.kernels.options import Head, KernelInputError, KLOptions
from kvopt.kernels.plan import make_plan
from kvopt.kernels.rows import divergence_rows
from kvopt.kernels.torch_backend import LogitChunks


@dataclass(frozen=True)
class Scores:
    """Per gold token, [N] each, float32 in nats (float64 for float64 inputs); no gradients.

    kl: the divergence that the options ask for. nll, reference_nll: −log q and −log p of the gold token.
    agree: bool, candidate and reference have the same most likely token. entropy: H(p) of the reference.
    """

    kl: Tensor
    nll: Tensor
    reference_nll: Tensor
    agree: Tensor
    entropy: Tensor


@torch.compiler.disable
@torch.no_grad()
def linear_scores(
    candidate_hidden: Tensor,
    reference_hidden: Tensor,
    head: Head,
    gold_ids: Tensor,
    options: KLOptions | None = None,
    reference_head: Head | None = None,
) -> Scores:
    """Scores of candidate_hidden [N, D] against reference_hidden [N, D_t] on gold_ids [N] (int64).

    Logits are float32 sums throughout, so that NLLs are good to about 1e-6; equal hidden states give a KL of exactly 0.
    """
    options = options or KLOptions()
    plan = make_plan(
        candidate_hidden, reference_hidden, head, reference_head or head, replace(options, products="float32")
    )
    count = len(candidate_hidden)
    if gold_ids.shape != (count,) or gold_ids.dtype != torch.int64:
        raise KernelInputError(f"gold_ids is {gold_ids.dtype} {tuple(gold_ids.shape)}; it must be int64 [{count}]")
    out = {
        name: torch.empty(count, dtype=plan.accumulate, device=candidate_hidden.device)
        for name in ("kl", "nll", "reference_nll", "entropy")
    }
    agree = torch.empty(count, dtype=torch.bool, device=candidate_hidden.device)
    if count == 0:
        return Scores(agree=agree, **out)
    with torch.autocast(candidate_hidden.device.type, enabled=False):
        chunks = LogitChunks(plan, candidate_hidden.device, count)
        for start in range(0, count, plan.rows_per_chunk):
            part = slice(start, start + plan.rows_per_chunk)
            z_t, u, _ = chunks.fill(candidate_hidden[part], reference_hidden[part])
            for rows, block_z, block_u, _ in chunks.blocks(z_t, u):
                where = slice(start + rows.start, min(start + rows.stop, start + len(z_t)))
                scores = _score_rows(block_z, block_u, gold_ids[where], options)
                agree[where] = scores.pop("agree")
                for name, values in scores.items():
                    out[name][where] = values
    return Scores(agree=agree, **out)


def _score_rows(z_t: Tensor, u: Tensor, gold: Tensor, options: KLOptions) -> dict[str, Tensor]:
    """Scores of a block of final logits; both inputs are overwritten."""
    gold = gold[:, None]
    z_s = z_t + u
    nll = -torch.log_softmax(z_s, -1).gather(1, gold)[:, 0]
    agree = z_s.argmax(-1) == z_t.argmax(-1)
    log_p = torch.log_softmax(z_t, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    reference_nll = -log_p.gather(1, gold)[:, 0]
    kl, _ = divergence_rows(z_t, u, options.divergence, options.beta, False)
    return {"kl": kl, "nll": nll, "reference_nll": reference_nll, "agree": agree, "entropy": entropy}
