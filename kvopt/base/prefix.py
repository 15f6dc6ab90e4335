"""Running bodies against a shared prefix: the one way in which scoring, optimizing, training and serving look at a
context.

A prefix holds keys (after RoPE) and values for every layer once; each layer joins them in front of a batch's own keys
and values inside the stock attention code, and stores nothing, so one prefix serves any number of batches, forward and
backward.

Symbols: L layers, H key/value heads, T prefix slots, d head dimension, B rows, n body positions, G gold tokens, D
hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from kvopt.base.flex import block_mask
from kvopt.base.loading import Base
from kvopt.base.merged import NAME as MERGED
from kvopt.base.merged import Apart
from kvopt.base.packing import Packing, by_layer, end_to_end, one_line, pack
from kvopt.base.rope import Rope
from kvopt.task.seam import Batch, Row, length_buckets, make_batch


@dataclass(frozen=True)
class Prefix:
    """Keys and values that a body attends to, one pair [H, T, d] a layer, in the model's dtype; bodies start at
    position T.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def __len__(self) -> int:
        return self.keys[0].shape[-2]

    def stack(self) -> Tensor:
        """[T, L, 2, H, d], the layout of the learned parameter and (flattened) of PEFT's ``prompt_embeddings``."""
        pairs = torch.stack([torch.stack(pair) for pair in zip(self.keys, self.values, strict=True)])
        return rearrange(pairs, "l two h t d -> t l two h d")

    @classmethod
    def unstack(cls, stacked: Tensor, dtype: torch.dtype) -> Prefix:
        """The inverse of :meth:`stack`, cast to ``dtype``; differentiable."""
        pairs = rearrange(stacked, "t l two h d -> l two h t d").to(dtype)
        return cls(tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs))

    def to(self, dtype: torch.dtype) -> Prefix:
        return Prefix(tuple(k.to(dtype) for k in self.keys), tuple(v.to(dtype) for v in self.values))

    def first(self, slots: int) -> Prefix:
        """The first slots alone."""
        return Prefix(tuple(k[:, :slots] for k in self.keys), tuple(v[:, :slots] for v in self.values))

    def kept(self, places: Tensor) -> Prefix:
        """The slots at these places [K], in their order."""
        return Prefix(tuple(k[:, places] for k in self.keys), tuple(v[:, places] for v in self.values))

    def rotated(self, rope: Rope, shift: int) -> Prefix:
        """The same slots with keys as they would be ``shift`` positions further on."""
        return Prefix(tuple(rope.rotate(k, shift, layer) for layer, k in enumerate(self.keys)), self.values)

    def detach(self) -> Prefix:
        return Prefix(tuple(k.detach() for k in self.keys), tuple(v.detach() for v in self.values))


class PrefixLayer(DynamicLayer):
    """One layer's read-only prefix: ``update`` returns prefix ⧺ new states and keeps neither; with ``apart`` it returns
    the new ones alone.
    """

    apart: bool = False

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.keys, self.values = keys[None], values[None]
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.apart:
            return key_states, value_states
        rows = key_states.shape[0]
        return (
            torch.cat([repeat(self.keys, "1 h t d -> b h t d", b=rows), key_states], dim=-2),
            torch.cat([repeat(self.values, "1 h t d -> b h t d", b=rows), value_states], dim=-2),
        )


class CaptureLayer(DynamicLayer):
    """One layer of a prefill: hands the states back and remembers the latest.

    It never grows, so that computing a checkpointed layer a second time changes nothing, and it is never cut to a
    sliding window.
    """

    seen: bool = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.seen:
            self.keys, self.values, self.seen = key_states, value_states, True
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0


def prefix_cache(prefix: Prefix) -> Cache:
    """A transformers cache whose layers hold the prefix and never grow."""
    return Cache(layers=[PrefixLayer(k, v) for k, v in zip(prefix.keys, prefix.values, strict=True)])


def prefill(
    base: Base, *, ids: Tensor | None = None, embeddings: Tensor | None = None, positions: Tensor | None = None
) -> Prefix:
    """The prefix that token ``ids`` [T] or input ``embeddings`` [T, D] leave behind, at positions 0 … T−1
    (or ``positions`` [T]); differentiable in the embeddings.

    Sliding-window layers keep all T slots (the attention mask decides what a body still sees).
    """
    length = len(ids) if ids is not None else len(embeddings) if embeddings is not None else 0
    if length == 0:
        return empty_prefix(base)
    cache = Cache(layers=[CaptureLayer() for _ in range(base.geometry.layers)])
    inputs = {"input_ids": ids[None]} if ids is not None else {"inputs_embeds": embeddings[None]}  # type: ignore[index]
    places = positions[None] if positions is not None else None
    base.backbone(**inputs, position_ids=places, past_key_values=cache, use_cache=True)
    return Prefix(tuple(layer.keys[0] for layer in cache.layers), tuple(layer.values[0] for layer in cache.layers))  # type: ignore[index]


class _GrowingLayer(PrefixLayer):
    """One layer of a prefix that is made longer: joins the new states and remembers the whole."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.whole = super().update(key_states, value_states)
        return self.whole


def prefill_after(base: Base, prefix: Prefix, ids: Tensor) -> Prefix:
    """The prefix that token ``ids`` [T'] leave behind when they follow ``prefix``, which stays in front: T + T' slots.

    The same, up to rounding, as one :func:`prefill` of all tokens.
    """
    if not len(prefix):
        return prefill(base, ids=ids)
    if not len(ids):
        return prefix
    layers = [_GrowingLayer(k, v) for k, v in zip(prefix.keys, prefix.values, strict=True)]
    positions = torch.arange(len(prefix), len(prefix) + len(ids), device=ids.device)
    cache = Cache(layers=layers)  # type: ignore[arg-type]
    base.backbone(input_ids=ids[None], position_ids=positions[None], past_key_values=cache, use_cache=True)
    return Prefix(tuple(layer.whole[0][0] for layer in layers), tuple(layer.whole[1][0] for layer in layers))


def empty_prefix(base: Base) -> Prefix:
    """No slots at all: the body alone."""
    g = base.geometry
    none = torch.zeros(g.kv_heads, 0, g.head_dim, dtype=base.dtype, device=base.device)
    return Prefix((none,) * g.layers, (none,) * g.layers)


def run_bodies(
    base: Base, prefix: Prefix, batch: Batch, start: int | None = None, *, seen: Tensor | None = None
) -> Tensor:
    """Hidden states after the final norm, [B, n, D], of bodies and gold outputs after the prefix, from position
    ``start`` on (default: the prefix's length). ``seen`` [B, T] bool: the slots that each row sees (default: all).
    """
    rows, width = batch.ids.shape
    length = len(prefix)
    mask = torch.cat([batch.mask.new_ones(rows, length) if seen is None else seen.to(batch.mask), batch.mask], dim=1)
    first = length if start is None else start
    positions = torch.arange(first, first + width, device=batch.ids.device)
    return base.backbone(
        input_ids=batch.ids,
        attention_mask=mask.long(),
        position_ids=repeat(positions, "n -> b n", b=rows),
        past_key_values=prefix_cache(prefix) if length else None,
        use_cache=False,
    ).last_hidden_state


def gold_hidden(base: Base, prefix: Prefix, batch: Batch, *, seen: Tensor | None = None) -> Tensor:
    """Hidden states [G, D] of the positions that predict the batch's gold tokens, row by row; no other position is
    ever scored. ``seen`` as in :func:`run_bodies`.

    Rows are packed or padded as :func:`packing_for` says; padded where they see different slots.
    """
    rows, columns = batch.predicts.unbind(-1)
    packing = packing_for(base, batch, len(prefix)) if seen is None else None
    if packing is None:
        return run_bodies(base, prefix, batch, seen=seen)[rows, columns]
    return run_packed(base, prefix, batch.ids, packing)[packing.places(rows, columns)]


def packing_for(base: Base, batch: Batch, length: int) -> Packing | None:
    """How to pack the batch's rows after a prefix of so many slots, None where they are padded: all in one line where
    FlexAttention runs, or on a CPU rows and prefix can be apart; else on a CPU in a few lines with a mask, where that
    is cheaper than padding them.
    """
    if base.attention == "padded":
        return None
    if base.capability.flex:
        return one_line(batch.lengths)
    return line_for(base, batch.lengths, length) or lines_for(base, batch.lengths, length)


def line_for(base: Base, lengths: Sequence[int], prefix: int) -> Packing | None:
    """All rows in one line, apart from the prefix, where the base's attention can take them so."""
    able = base.model.config._attn_implementation == MERGED and base.attention != "padded"
    return end_to_end(lengths) if able and prefix else None


def lines_for(base: Base, lengths: Sequence[int], prefix: int) -> Packing | None:
    """As :func:`packing_for`, for an attention that takes a mask of numbers."""
    always = base.attention == "packed"
    if base.attention == "padded" or not base.capability.packs or (base.device.type != "cpu" and not always):
        return None
    return pack(lengths, prefix, always=always)


def packed_masks(base: Base, packing: Packing, prefix: int) -> Any:
    """What transformers is given as the mask of packed rows: block masks, or [B, 1, n, T + n] in the form that the
    model's attention adds or selects by.
    """
    geometry, device = base.geometry, base.device

    def make(window: int | None) -> Any:
        if packing.in_blocks:
            return block_mask(packing, prefix, window, device)
        return base.capability.mask(packing.mask(prefix, window).to(device), base.dtype)

    return by_layer(geometry.layer_types, geometry.sliding_window, make)


def run_packed(base: Base, prefix: Prefix, ids: Tensor, packing: Packing, cache: Cache | None = None) -> Tensor:
    """Hidden states after the final norm, [lines, width, D], of rows of ``ids`` in the lines of ``packing``, after the
    prefix; ``cache`` stands for it where keys and values are to be kept.
    """
    length = len(prefix)
    if cache is None and length:
        cache = prefix_cache(prefix)
    if packing.apart and cache is not None:
        for layer in cache.layers:
            layer.apart = True  # type: ignore[attr-defined]
        seen = Apart(prefix.keys, prefix.values, packing.lengths.tolist()).arguments
    else:
        seen = {"attention_mask": packed_masks(base, packing, length)}
    return base.backbone(
        input_ids=packing.packed(ids),
        **seen,
        position_ids=packing.positions(length).to(base.device),
        past_key_values=cache,
        use_cache=False,
    ).last_hidden_state


@dataclass(frozen=True)
class GoldStates:
    """The hidden states of one batch of rows: ``rows`` are their places among all rows, ``hidden`` [G, D] the positions
    that predict their gold tokens, ``gold`` [G] int64 these tokens, ``counts`` how many of them each row has.
    """

    rows: list[int]
    hidden: Tensor
    gold: Tensor
    counts: list[int]

    def split(self, values: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Each row's place and its part of ``values`` [G, …]."""
        return zip(self.rows, values.split(self.counts), strict=True)


@torch.no_grad()
def batch_states(base: Base, prefix: Prefix, rows: Sequence[Row], index: list[int]) -> GoldStates:
    """:func:`gold_hidden` of one batch, the rows at these places, without gradients."""
    batch = make_batch(rows, index).to(base.device)
    return GoldStates(index, gold_hidden(base, prefix, batch), batch.gold, [len(rows[i].gold) for i in index])


@torch.no_grad()
def gold_states(
    base: Base,
    prefix: Prefix,
    rows: Sequence[Row],
    *,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> Iterator[GoldStates]:
    """:func:`gold_hidden` of all rows, without gradients, in batches of similar length (shortest first).

    ``progress`` is called with the number of rows of each batch once the caller is done with it.
    """
    for index in length_buckets(rows, batch_size):
        yield batch_states(base, prefix, rows, index)
        if progress:
            progress(len(index))
