"""Exact logits for the likeliest tokens of rows whose other logits were rounded to 16 bits.

A 16-bit logit of size 38 is off by up to 0.06, so its softmax probability by 6 %. The mass sits in few tokens: their
logits are recomputed as float32 dot products, and what is left of the rounding averages out over the many small ones.
Measured on SmolLM2: gradient error 2e-2 without, 4e-3 with the 16 likeliest tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOP = 16
GROUP = 64
GATHER_BYTES = 16 * 2**20


def top_tokens(logits: Tensor, count: int = TOP) -> Tensor:
    """[R, count] ids of the largest logits [R, V], unsorted: the best groups of columns first, then within them."""
    vocabulary = logits.shape[1]
    width = vocabulary // GROUP
    if width < 4 * count:
        return logits.topk(min(count, vocabulary), -1, sorted=False).indices
    body = logits[:, : width * GROUP]
    groups = body.unflatten(1, (GROUP, width)).amax(1).topk(count, -1, sorted=False).indices
    offsets = torch.arange(0, width * GROUP, width, device=logits.device)
    tail = torch.arange(width * GROUP, vocabulary, device=logits.device).expand(len(logits), -1)
    candidates = torch.cat([(groups[:, None, :] + offsets[None, :, None]).flatten(1), tail], 1)
    best = logits.gather(1, candidates).topk(count, -1, sorted=False).indices
    return candidates.gather(1, best)


def exact_logits(tokens: Tensor, weight: Tensor, *hidden: Tensor) -> list[Tensor]:
    """For each hidden [R, D] the float32 products [R, K] with the weight rows that tokens [R, K] name."""
    count = tokens.shape[1]
    out = [torch.empty(tokens.shape, dtype=torch.float32, device=weight.device) for _ in hidden]
    step = max(1, GATHER_BYTES // (4 * count * weight.shape[1]))
    for start in range(0, len(tokens), step):
        part = slice(start, start + step)
        rows = weight[tokens[part].flatten()].float().unflatten(0, (-1, count))
        columns = torch.stack([h[part].float() for h in hidden], -1)
        products = torch.bmm(rows, columns)
        for index, target in enumerate(out):
            target[part] = products[..., index]
    return out
