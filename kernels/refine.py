"""Exact logits for the likeliest tokens of rows whose other logits were rounded to 16 bits.

A 16-bit logit of size 38 is off by up to 0.06, so its softmax probability by 6 %. The mass sits in few tokens: their
logits are recomputed as float32 dot products, and what is left of the rounding averages out over the many small ones.
Measured on SmolLM2: gradient error 2e-2 without, 4e-3 with the 16 likeliest tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvopt.kernels.options import Head

TOP = 16
GROUP = 64
GATHER_BYTES = 16 * 2**20
MARGIN = 2.0**-7
"""A 16-bit logit differs from the exact one by less than this share of it (bfloat16 rounds by 2^-9 at most)."""


class Refined(NamedTuple):
    """Tokens [R, K] of a block of rows whose logits are exact, and what the logits of the others cannot exceed.

    Logits here are those before a softcap and the temperature, which change no order. z_t, u: [R, K] float32, reference
    and difference. floor_t, floor_s: [R], the largest rounded logit of reference and candidate among the other tokens
    (−inf where there is none; floor_s is None unless the candidate's likeliest tokens were asked for).
    """

    tokens: Tensor
    z_t: Tensor
    u: Tensor
    floor_t: Tensor
    floor_s: Tensor | None

    def agreement(self) -> tuple[Tensor, Tensor]:
        """Whether both models have the same likeliest token [R], and whether that is certain [R]."""
        assert self.floor_s is not None
        z_s = self.z_t + self.u
        best_t, at_t = self.z_t.max(-1, keepdim=True)
        best_s, at_s = z_s.max(-1, keepdim=True)
        same = self.tokens.gather(1, at_t) == self.tokens.gather(1, at_s)
        sizes = best_t.abs() + self.u.abs().amax(-1, keepdim=True)
        certain = (best_t - MARGIN * sizes > self.floor_t[:, None]) & (best_s - MARGIN * sizes > self.floor_s[:, None])
        return same[:, 0], certain[:, 0]


def refine_(
    z_t: Tensor,
    u: Tensor,
    head: Head,
    reference: Tensor,
    difference: Tensor,
    extra: Tensor | None = None,
    candidate_too: bool = False,
) -> Refined:
    """Replaces logits of the reference's likeliest tokens by exact ones, in place.

    Args:
        z_t, u: [R, V] float32, rounded logits of the reference and of the difference, before softcap and temperature.
        reference, difference: [R, D], the hidden states that they were made of.
        extra: [R] int64, one more token of each row to refine.
        candidate_too: the candidate's likeliest tokens as well.
    """
    tokens, floor_t = top_tokens(z_t)
    floor_s = None
    if candidate_too:
        others, floor_s = top_tokens(z_t + u)
        tokens = torch.cat([tokens, others], 1)
    if extra is not None:
        tokens = torch.cat([tokens, extra[:, None]], 1)
    exact_t, exact_u = exact_products(tokens, head.rows, reference, difference)
    if head.offsets is not None:
        exact_t = exact_t + head.offsets[tokens].float()
    exact_t, exact_u = exact_t * head.scale, exact_u * head.scale
    z_t.scatter_(1, tokens, exact_t)
    u.scatter_(1, tokens, exact_u)
    return Refined(tokens, exact_t, exact_u, floor_t, floor_s)


def top_tokens(logits: Tensor, count: int = TOP) -> tuple[Tensor, Tensor]:
    """Ids [R, count] of the largest logits [R, V], unsorted, and what no other logit exceeds [R] (−inf without others).

    The best groups of columns first, then the best within them: the largest ``count`` lie in ``count`` groups.
    """
    vocabulary = logits.shape[1]
    if vocabulary <= count:
        ids = torch.arange(vocabulary, device=logits.device).expand(len(logits), -1)
        return ids, logits.new_full((len(logits),), float("-inf"))
    width = vocabulary // GROUP
    if width < 4 * count:
        best = logits.topk(count, -1, sorted=False)
        return best.indices, best.values.amin(-1)
    body = logits[:, : width * GROUP].unflatten(1, (GROUP, width))
    groups = body.amax(1).topk(count, -1, sorted=False).indices
    members = body.gather(2, groups[:, None, :].expand(-1, GROUP, -1)).flatten(1)
    tail = logits[:, width * GROUP :]
    best = torch.cat([members, tail], 1).topk(count, -1, sorted=False)
    place, floor = best.indices, best.values.amin(-1)
    in_group = groups.gather(1, place % count) + place.div(count, rounding_mode="floor") * width
    return torch.where(place < GROUP * count, in_group, place + (width - count) * GROUP), floor


def exact_products(tokens: Tensor, weight: Tensor, *hidden: Tensor) -> list[Tensor]:
    """For each hidden [R, D] the float32 products [R, K] with the weight rows that tokens [R, K] name."""
    count = tokens.shape[1]
    columns = torch.stack([h.float() for h in hidden], 1)
    out = torch.empty(len(tokens), len(hidden), count, dtype=torch.float32, device=weight.device)
    step = max(1, GATHER_BYTES // (4 * count * weight.shape[1]))
    for start in range(0, len(tokens), step):
        part = slice(start, start + step)
        rows = weight[tokens[part].flatten()].float().unflatten(0, (-1, count))
        torch.bmm(columns[part], rows.transpose(1, 2), out=out[part])
    return list(out.unbind(1))
