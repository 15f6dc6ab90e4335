"""Start from attention matching: per layer and key/value head, the T keys that the task's own queries attend to most,
and values refitted so that attention with the few slots gives what attention with the whole text gave.

Source: the closed-form compaction of "Fast KV Compaction via Attention Matching" (2026), without its per-slot biases,
which no cache can hold. Here the bodies' own keys stay in the softmax, and the fit is a ridge regression towards the
kept slots' own values.

Symbols: P text tokens, T slots kept, Q queries, n keys of the body, d head dimension.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kvopt.attention import Prefix, run_bodies
from kvopt.contexts.initial.task import InitialTask
from kvopt.encoding import length_buckets, make_batch
from kvopt.errors import InputError
from kvopt.model import Base
from kvopt.rope import rotate_keys

_CAPTURE = "kvopt_capture"
MAX_QUERIES = 2048  # per layer and key/value head
RIDGE = 0.1  # relative to the mean squared attention weight of a slot, times the number of queries


@dataclass
class _Statistics:
    """Of one layer's attention, for the queries chosen: scores over prefix and body, and values read."""

    scores: list[Tensor] = field(default_factory=list)  # [H, Q, P] unnormalized logits over the text
    body_lse: list[Tensor] = field(default_factory=list)  # [H, Q] log sum exp of the logits over the body
    body_read: list[Tensor] = field(default_factory=list)  # [H, Q, d] softmax over the body alone, times its values


def matched(task: InitialTask) -> Tensor:
    """Keys kept per layer and head (slot 0 always), values refitted, keys re-rotated by T − P. Raises InputError for
    soft prompts.
    """
    if task.kind != "kv":
        raise InputError(
            "init: matched works on keys and values",
            where=f"contexts.{task.name}",
            mend="use kind: kv, or another init",
        )
    return fewer_slots(task, task.text_prefix())


def fewer_slots(task: InitialTask, prefix: Prefix, *, refit: bool = True) -> Tensor:
    """``task.tokens`` slots [T, L, 2, H, d] in place of any longer prefix, in the prefix's dtype; without ``refit`` the
    kept slots keep their values.
    """
    if not task.rows:
        raise ValueError("attention matching needs training rows")
    shift = task.tokens - len(prefix)
    keys, values = [], []
    for layer, statistics in enumerate(_observe(task, prefix.to(task.base.dtype))):
        kept, refitted = _match_layer(prefix.keys[layer], prefix.values[layer], statistics, task.tokens, refit)
        keys.append(rotate_keys(kept, shift, layer, task.base))
        values.append(refitted.to(kept.dtype))
    return Prefix(tuple(keys), tuple(values)).stack()


def _match_layer(
    keys: Tensor, values: Tensor, seen: _Statistics, slots: int, refit: bool = True
) -> tuple[Tensor, Tensor]:
    """Keys and values [H, T, d] in place of [H, P, d]."""
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
    if not refit:
        return kept_keys, kept_values
    total = torch.logaddexp(scores.logsumexp(-1, keepdim=True), body)
    weights = (scores - total).exp()
    residual = target - (body - total).exp() * body_read - weights @ kept_values
    gram = weights.transpose(1, 2) @ weights
    ridge = RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] + 1e-6
    correction = torch.linalg.solve(
        gram + ridge * torch.eye(slots, device=gram.device), weights.transpose(1, 2) @ residual
    )
    return kept_keys, kept_values + correction


def _observe(task: InitialTask, prefix: Prefix) -> list[_Statistics]:
    base, length = task.base, len(prefix)
    layers = [_Statistics() for _ in range(base.geometry.layers)]
    share = min(1.0, MAX_QUERIES / _queries_per_head(task))
    generator = task.generator()

    def observe(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float | None) -> None:
        heads = key.shape[1]
        logits = rearrange(query, "b (h g) q d -> b h g q d", h=heads).float() @ key.float()[:, :, None].transpose(
            -1, -2
        )
        logits = logits * (scaling if scaling is not None else query.shape[-1] ** -0.5)
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        logits = logits.masked_fill(~allowed[:, :, None], -torch.inf)
        body = logits[..., length:]
        read = body.softmax(-1) @ value[:, :, None, length:].float()
        parts = (logits[..., :length], body.logsumexp(-1), read)
        chosen = observe.chosen  # type: ignore[attr-defined]
        scores, lse, read = (rearrange(_pick(part, chosen), "h g q ... -> h (g q) ...") for part in parts)
        seen = layers[module.layer_idx]
        seen.scores.append(scores)
        seen.body_lse.append(lse)
        seen.body_read.append(read)

    with torch.no_grad(), _capturing(base, observe):
        for index in length_buckets(task.rows, 16):
            batch = make_batch(task.rows, index).to(base.device)
            drawn = torch.rand(batch.mask.shape, generator=generator).to(base.device) < share
            observe.chosen = (batch.mask & drawn).nonzero(as_tuple=True)  # type: ignore[attr-defined]
            run_bodies(base, prefix, batch)
    return layers


def _pick(part: Tensor, chosen: tuple[Tensor, Tensor]) -> Tensor:
    """[B, h, g, q, …] at the chosen (row, position) pairs: [h, g, Q, …]."""
    rows, positions = chosen
    return rearrange(part[rows, :, :, positions], "q h g ... -> h g q ...")


def _queries_per_head(task: InitialTask) -> int:
    config = task.base.model.config.get_text_config()
    groups = max(1, config.num_attention_heads // task.base.geometry.kv_heads)
    return groups * sum(len(row) - 1 for row in task.rows)


@contextlib.contextmanager
def _capturing(base: Base, observe: Any) -> Iterator[None]:
    """Run the base's attention through sdpa, and show ``observe`` its inputs (queries and keys after RoPE)."""

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any) -> Any:
        observe(module, query, key, value, mask, kwargs.get("scaling"))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register(_CAPTURE, attention)
    AttentionMaskInterface.register(_CAPTURE, sdpa_mask)
    before = base.model.config._attn_implementation
    base.model.set_attn_implementation(_CAPTURE)
    try:
        yield
    finally:
        base.model.set_attn_implementation(before)
