"""Attention matching: a long prefix as a short one. Per layer and key/value head, the T keys that the task's own
queries attend to most, and values refitted so that attention with the few slots gives what attention with the long one
gave.

Source: the closed-form compaction of "Fast KV Compaction via Attention Matching" (2026), without its per-slot biases,
which no cache can hold. Here the bodies' own keys stay in the softmax, and the fit is a ridge regression towards the
kept slots' own values.

Symbols: P text tokens, T slots kept, Q queries, n keys of the body, d head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from kvopt.base.attention import allowed_keys, watched
from kvopt.base.loading import Base
from kvopt.base.prefix import Prefix, run_bodies
from kvopt.task.seam import Row, length_buckets, make_batch

MAX_QUERIES = 2048  # per layer and key/value head
RIDGE = 0.1  # relative to the mean squared attention weight of a slot, times the number of queries


@dataclass
class _Statistics:
    """Of one layer's attention, for the queries chosen: scores over prefix and body, and values read."""

    scores: list[Tensor] = field(default_factory=list)  # [H, Q, P] unnormalized logits over the text
    body_lse: list[Tensor] = field(default_factory=list)  # [H, Q] log sum exp of the logits over the body
    body_read: list[Tensor] = field(default_factory=list)  # [H, Q, d] softmax over the body alone, times its values


def fewer_slots(
    base: Base,
    prefix: Prefix,
    tokens: int,
    rows: Sequence[Row],
    *,
    refit: bool = True,
    ridge: float = RIDGE,
    queries: int = MAX_QUERIES,
    seed: int = 0,
) -> Tensor:
    """``tokens`` slots [T, L, 2, H, d] in place of any longer prefix, in the prefix's dtype; slot 0 always stays, and
    keys are re-rotated by T − P.

    Args:
        rows: training rows, whose bodies give the queries.
        refit: fit values; without, the kept slots keep theirs.
        ridge: of the fit, relative to the mean squared attention weight of a slot, times the number of queries.
        queries: at most so many per layer and key/value head, drawn with ``seed``.
    """
    if not rows:
        raise ValueError("attention matching needs training rows")
    shift = tokens - len(prefix)
    keys, values = [], []
    for layer, seen in enumerate(_observe(base, prefix.to(base.dtype), rows, queries, seed)):
        kept, fitted = _match_layer(prefix.keys[layer], prefix.values[layer], seen, tokens, ridge if refit else None)
        keys.append(base.rope.rotate(kept, shift, layer))
        values.append(fitted.to(kept.dtype))
    return Prefix(tuple(keys), tuple(values)).stack()


def _match_layer(
    keys: Tensor, values: Tensor, seen: _Statistics, slots: int, ridge: float | None
) -> tuple[Tensor, Tensor]:
    """Keys and values [H, T, d] in place of [H, P, d]; values are refitted with a ``ridge``."""
    scores = torch.cat(seen.scores, dim=1)
    body = torch.cat(seen.body_lse, dim=1)[..., None]
    body_read = torch.cat(seen.body_read, dim=1)
    total = torch.logaddexp(scores.logsumexp(-1, keepdim=True), body)
    weights = (scores - total).exp()
    target = weights @ values.float() + (body - total).exp() * body_read

    mass = weights.sum(dim=1)
    mass[:, 0] = torch.inf
    keep = mass.topk(slots, dim=-1).indices.sort(dim=-1).values  # [H, T]
    scores = scores.gather(-1, keep[:, None].expand(-1, scores.shape[1], -1))
    kept_values = values.float().gather(1, keep[..., None].expand(-1, -1, values.shape[-1]))
    kept_keys = keys.gather(1, keep[..., None].expand(-1, -1, keys.shape[-1]))
    if ridge is None:
        return kept_keys, kept_values
    total = torch.logaddexp(scores.logsumexp(-1, keepdim=True), body)
    weights = (scores - total).exp()
    residual = target - (body - total).exp() * body_read - weights @ kept_values
    gram = weights.transpose(1, 2) @ weights
    damping = ridge * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] + 1e-6
    correction = torch.linalg.solve(
        gram + damping * torch.eye(slots, device=gram.device), weights.transpose(1, 2) @ residual
    )
    return kept_keys, kept_values + correction


def _observe(base: Base, prefix: Prefix, rows: Sequence[Row], queries: int, seed: int) -> list[_Statistics]:
    """What every layer's attention over ``prefix`` looks like to a drawn share of the bodies' queries."""
    length = len(prefix)
    layers = [_Statistics() for _ in range(base.geometry.layers)]
    share = min(1.0, queries / _queries_per_head(base, rows))
    generator = torch.Generator().manual_seed(seed)
    chosen: tuple[Tensor, ...] = ()  # (row, position) pairs of the batch that runs

    def observe(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> None:
        heads = key.shape[1]
        logits = rearrange(query, "b (h g) q d -> b h g q d", h=heads).float() @ key.float()[:, :, None].transpose(
            -1, -2
        )
        logits = logits * (scaling if scaling is not None else query.shape[-1] ** -0.5)
        logits = logits.masked_fill(~allowed_keys(mask)[:, :, None], -torch.inf)
        body = logits[..., length:]
        read = body.softmax(-1) @ value[:, :, None, length:].float()
        parts = (logits[..., :length], body.logsumexp(-1), read)
        scores, lse, read = (rearrange(_pick(part, *chosen), "h g q ... -> h (g q) ...") for part in parts)
        seen = layers[module.layer_idx]
        seen.scores.append(scores)
        seen.body_lse.append(lse)
        seen.body_read.append(read)

    with torch.no_grad(), watched(base, observe):
        for index in length_buckets(rows, 16):
            batch = make_batch(rows, index).to(base.device)
            drawn = torch.rand(batch.mask.shape, generator=generator).to(base.device) < share
            chosen = (batch.mask & drawn).nonzero(as_tuple=True)
            run_bodies(base, prefix, batch)
    return layers


def _pick(part: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """[B, h, g, q, …] at the chosen (row, position) pairs: [h, g, Q, …]."""
    return rearrange(part[rows, :, :, positions], "q h g ... -> h g q ...")


def _queries_per_head(base: Base, rows: Sequence[Row]) -> int:
    config = base.model.config.get_text_config()
    groups = max(1, config.num_attention_heads // base.geometry.kv_heads)
    return groups * sum(len(row) - 1 for row in rows)
