"""Attention matching: a long prefix as a short one. Per layer and key/value head, the T keys whose loss would change
most of what the task's queries read, and values refitted so that attention with the few slots gives what attention with
the long prefix gave.

Two streams of the same bodies go through the base side by side, one after the long prefix and one after the short one.
At each layer the short one's slots are fitted to the long one's attention outputs, from the queries and keys that the
layers below really give after compaction, and then used; errors of lower layers are so made good, and no more than one
layer's statistics are ever held.

Source: the closed-form compaction of "Fast KV Compaction via Attention Matching" (arXiv 2602.16284), without its
per-slot biases, which no cache can hold. Here the bodies' own keys stay in the softmax, and the fit is a ridge
regression towards the kept slots' own values.

Symbols: P slots of the long prefix, T slots kept, L layers, B lines of bodies, n positions of a line, N places looked
at, H key/value heads, g query heads of each, Q = g N queries of a key/value head, d head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvopt.base.attention import allowed_keys, replaced
from kvopt.base.loading import Base
from kvopt.base.prefix import Prefix, PrefixLayer, lines_for
from kvopt.contexts.key_fit import attention_weights, moved_keys
from kvopt.task.seam import Row, make_batch

MAX_QUERIES = 16384  # per layer and key/value head
RIDGE = 0.001  # relative to the mean squared attention weight of a slot, times the number of queries
QUERIES_AT_ONCE = 4096
LINES_AT_ONCE = 8


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
    key_steps: int = 0,
    importance: Tensor | None = None,
) -> Tensor:
    """``tokens`` slots [T, L, 2, H, d] in place of any longer prefix, in the prefix's dtype; slot 0 always stays, and
    keys are re-rotated by T − P.

    Args:
        rows: training rows, whose bodies give the queries; as many of them as the queries need.
        refit: fit values; without, the kept slots keep theirs.
        ridge: of the fit, relative to the mean squared attention weight of a slot, times the number of queries.
        queries: at most so many per layer and key/value head, drawn with ``seed``.
        key_steps: with refit, steps of descent on the kept keys before values are fitted.
        importance: [L, H, P], the slots with the largest stay; default: the squared attention weight, summed over
            queries, times the squared distance of the slot's value from the mean value, which is about what its loss
            would change in what is read.
    """
    if not rows:
        raise ValueError("attention matching needs training rows")
    if importance is not None and not refit:
        return _evicted(base, prefix, tokens, importance)
    return _Compaction(base, prefix, tokens, refit, ridge, key_steps, importance).run(rows, queries, seed)


@dataclass
class _Seen:
    """One layer's attention of the queries after the short prefix, and what it should read."""

    query: Tensor  # [H, Q, d], scaled
    body_lse: Tensor  # [H, Q] log sum exp of the logits over the body
    body_read: Tensor  # [H, Q, d] softmax over the body alone, times its values
    target: Tensor  # [H, Q, d] what attention reads after the long prefix
    visible: Tensor  # [Q, T] the short prefix's slots that the query may look at
    importance: Tensor  # [H, P]


class _BodyLayer(PrefixLayer):
    """One layer of a prefix that is counted in masks, and that the attention itself puts in front."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states


class _Compaction:
    """The short prefix while it is made, layer by layer, inside one forward pass."""

    def __init__(
        self,
        base: Base,
        prefix: Prefix,
        tokens: int,
        refit: bool,
        ridge: float,
        key_steps: int,
        importance: Tensor | None,
    ) -> None:
        self.base, self.prefix, self.long = base, prefix, prefix.to(base.dtype)
        self.tokens, self.refit, self.ridge, self.key_steps = tokens, refit, ridge, key_steps
        self.importance = importance
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.columns: tuple[Tensor, ...] = ()  # of each line, the places whose queries are looked at

    @torch.no_grad()
    def run(self, rows: Sequence[Row], queries: int, seed: int) -> Tensor:
        """The short prefix [T, L, 2, H, d]."""
        config = self.base.model.config.get_text_config()
        groups = max(1, config.num_attention_heads // self.base.geometry.kv_heads)
        places = max(1, queries // groups)
        rows, length = _first_rows(rows, places), len(self.prefix)
        batch = make_batch(rows, range(len(rows))).to(self.base.device)
        rank = torch.rand(batch.mask.shape, generator=torch.Generator().manual_seed(seed)).to(batch.mask.device)
        chosen = rank.masked_fill(~batch.mask, torch.inf).flatten().argsort()[: min(places, batch.tokens)]
        at = chosen // batch.mask.shape[1], chosen % batch.mask.shape[1]
        packing = lines_for(self.base, batch.lengths, length) if self.base.geometry.sliding_window is None else None
        if packing is not None:
            ids = packing.packed(batch.ids)
            mask, positions = packing.mask(length).to(ids.device), packing.positions(length).to(ids.device)
            at = packing.places(*at)
        else:
            ids, mask = batch.ids, torch.cat([batch.mask.new_ones(len(rows), length), batch.mask], dim=1).long()
            positions = repeat(torch.arange(length, length + ids.shape[1], device=ids.device), "n -> b n", b=len(rows))
        self.columns = tuple(at[1][at[0] == line].sort().values for line in range(len(ids)))
        with replaced(self.base, self._attention):
            self.base.backbone(
                input_ids=torch.cat([ids, ids]),
                attention_mask=torch.cat([mask, mask]),
                position_ids=torch.cat([positions, positions]),
                past_key_values=Cache(
                    layers=[_BodyLayer(k, v) for k, v in zip(self.long.keys, self.long.values, strict=True)]
                ),
                use_cache=False,
            )
        short = Prefix(tuple(self.keys), tuple(self.values))
        return short.rotated(self.base.rope, self.tokens - length).stack()

    def _attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Both streams' attention outputs [2 B, n, H g, d]; the layer's slots are made between them."""
        layer, length, lines = module.layer_idx, len(self.prefix), len(query) // 2
        if mask is None:  # of bodies of one token each, to which everything is visible
            mask = torch.ones(1, 1, query.shape[2], length + key.shape[2], dtype=torch.bool, device=query.device)
        mask = mask.expand(2 * lines, -1, -1, -1)
        # A mask depends on distances, and the short prefix ends where the long one does.
        streams = [
            (query[:lines], key[:lines], value[:lines], mask[:lines]),
            (query[lines:], key[lines:], value[lines:], mask[lines:, ..., length - self.tokens :]),
        ]
        target = _attend(module, *streams[0], self.long.keys[layer], self.long.values[layer], kwargs)
        seen = self._look(layer, query[lines:], key[lines:], value[lines:], mask[lines:], target, kwargs.get("scaling"))
        keys, values = self._fit(layer, seen)
        self.keys.append(keys)
        self.values.append(values)
        read = _attend(module, *streams[1], keys.to(query.dtype), values.to(query.dtype), kwargs)
        return torch.cat([target, read]), None

    def _look(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, target: Tensor, scaling: float | None
    ) -> _Seen:
        """What the queries that were chosen see of the bodies, and what each slot of the long prefix is to them."""
        keys, values = self.prefix.keys[layer].float(), self.prefix.values[layer].float()
        heads, length = keys.shape[0], len(self.prefix)
        parts: list[tuple[Tensor, ...]] = []
        importance = torch.zeros_like(keys[..., 0])
        apart = reduce((values - values.mean(1, keepdim=True)).square(), "h p d -> h p", "sum")
        for line, columns in enumerate(self.columns):
            if not len(columns):
                continue
            asks = rearrange(query[line][:, columns], "(h g) q d -> h (g q) d", h=heads).float()
            asks = asks * (scaling if scaling is not None else query.shape[-1] ** -0.5)
            wanted = rearrange(target[line][columns], "q (h g) d -> h (g q) d", h=heads).float()
            allowed = repeat(allowed_keys(mask[line, 0, columns]), "q m -> (g q) m", g=query.shape[1] // heads)
            logits = asks @ key[line].float().transpose(1, 2)
            logits = logits.masked_fill(~allowed[:, length:], -torch.inf)
            lse, read = logits.logsumexp(-1), logits.softmax(-1) @ value[line].float()
            if self.importance is None:
                importance += attention_weights(asks, keys, allowed[:, :length], lse)[0].square().sum(1)
            parts.append((asks, lse, read, wanted, allowed[:, length - self.tokens : length]))
        asked, lse, read, wanted, visible = zip(*parts, strict=True)
        return _Seen(
            query=torch.cat(asked, dim=1),
            body_lse=torch.cat(lse, dim=1),
            body_read=torch.cat(read, dim=1),
            target=torch.cat(wanted, dim=1),
            visible=torch.cat(visible),
            importance=importance * apart if self.importance is None else self.importance[layer].to(keys.device),
        )

    def _fit(self, layer: int, seen: _Seen) -> tuple[Tensor, Tensor]:
        """Keys and values [H, T, d] of the layer, at their old positions."""
        keys, values = self.prefix.keys[layer], self.prefix.values[layer]
        kept_keys, kept_values = _most_important(keys, values, seen.importance, self.tokens)
        if not self.refit:
            return kept_keys, kept_values
        if self.key_steps and self.tokens > 1:
            about = (seen.query, seen.visible, seen.body_lse, seen.body_read, seen.target)
            kept_keys = moved_keys(kept_keys, kept_values, *about, self.key_steps).to(keys.dtype)
        old = kept_values.float()
        gram: Tensor | float = 0.0
        moment: Tensor | float = 0.0
        for first in range(0, seen.query.shape[1], QUERIES_AT_ONCE):
            part = slice(first, first + QUERIES_AT_ONCE)
            weights, rest = attention_weights(
                seen.query[:, part], kept_keys.float(), seen.visible[part], seen.body_lse[:, part]
            )
            residual = seen.target[:, part] - rest * seen.body_read[:, part] - weights @ old
            gram = gram + weights.transpose(1, 2) @ weights
            moment = moment + weights.transpose(1, 2) @ residual
        assert isinstance(gram, Tensor)
        assert isinstance(moment, Tensor)
        damping = self.ridge * gram.diagonal(dim1=-2, dim2=-1).mean(-1) + 1e-6
        gram.diagonal(dim1=-2, dim2=-1).add_(damping[:, None])
        return kept_keys, (old + torch.linalg.solve(gram, moment)).to(values.dtype)


def _most_important(keys: Tensor, values: Tensor, importance: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Slot 0 and the others with the largest ``importance`` [H, P], in their order: keys and values [H, T, d]."""
    importance = importance.clone()
    importance[:, 0] = torch.inf
    keep = importance.topk(tokens, dim=-1).indices.sort(dim=-1).values
    index = repeat(keep, "h t -> h t d", d=keys.shape[-1])
    return keys.gather(1, index), values.gather(1, index)


def _evicted(base: Base, prefix: Prefix, tokens: int, importance: Tensor) -> Tensor:
    """The slots that stay, with their own values [T, L, 2, H, d]."""
    pairs = zip(prefix.keys, prefix.values, importance.to(base.device), strict=True)
    keys, values = zip(*(_most_important(*each, tokens) for each in pairs), strict=True)
    return Prefix(keys, values).rotated(base.rope, tokens - len(prefix)).stack()


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, keys: Tensor, values: Tensor, kwargs: Any
) -> Tensor:
    """Attention outputs [B, n, H g, d] of bodies after prefix ``keys``, ``values`` [H, T, d], some lines at once."""
    out = []
    for part in torch.arange(len(query)).split(LINES_AT_ONCE):
        front = [repeat(x, "h t d -> b h t d", b=len(part)) for x in (keys, values)]
        joined = [torch.cat([a, b[part]], dim=2) for a, b in zip(front, (key, value), strict=True)]
        out.append(sdpa_attention_forward(module, query[part], *joined, mask[part], **kwargs)[0])
    return torch.cat(out)


def _first_rows(rows: Sequence[Row], places: int) -> Sequence[Row]:
    """The first rows that have so many places, or all."""
    total = 0
    for count, row in enumerate(rows, 1):
        total += len(row) - 1
        if total >= places:
            return rows[:count]
    return rows
