"""Answers of a model after a shared prefix: greedy or sampled decoding in batches, for every kind of context.

The prefix is computed once; bodies stand right-aligned after it, in batches of similar length. Sliding windows
count padding as tokens, so models that have them get batches of bodies of equal length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from einops import repeat
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache, DynamicLayer

from kvopt.base.launch import split
from kvopt.base.loading import Base
from kvopt.base.prefix import Prefix, PrefixLayer, line_for, lines_for, run_packed
from kvopt.errors import InputError

Progress = Callable[[int], None]


@torch.no_grad()
def generate(
    base: Base,
    prefix: Prefix,
    bodies: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: frozenset[int] | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
    keep_stop: bool = False,
    progress: Progress | None = None,
) -> list[tuple[int, ...]]:
    """Token ids of one answer for each body, in order, without the stop token (unless ``keep_stop``).

    Args:
        base: the base, or a student in its place.
        prefix: what every body attends to (``context.prefix(base)``).
        bodies: token ids; each must hold at least one.
        max_new_tokens: an answer is cut here.
        stop: ids that end an answer; default: :func:`stop_ids`.
        temperature: 0 takes the most likely token; above, tokens are sampled, each batch from its own stream of
            ``seed``.
        batch_size: bodies a batch.
        keep_stop: leave the stop token at the end of the answers that reached one.
        progress: called with the number of bodies finished.

    Raises:
        InputError: a body is empty, or prefix, body and answer do not fit the window.
    """
    ends = stop_ids(base) if stop is None else stop
    longest = max(map(len, bodies), default=0)
    if any(len(body) == 0 for body in bodies):
        raise InputError("a body without tokens cannot be answered", fix="put text after the context")
    if len(prefix) + longest + max_new_tokens > base.geometry.window:
        raise InputError(
            f"{len(prefix)} slots, a body of {longest} tokens and {max_new_tokens} new ones do not fit the window of"
            f" {base.geometry.window}",
            fix=f"at most {base.geometry.window - len(prefix) - longest} new tokens fit",
        )
    answers: list[tuple[int, ...]] = [()] * len(bodies)
    equal = base.geometry.sliding_window is not None
    batches = list(_batches(bodies, batch_size, equal))
    streams = {index[0]: seed * 1_000_003 + number for number, index in enumerate(batches)}
    settings = (max_new_tokens, ends, temperature, keep_stop)
    for index, answered in zip(
        batches, split(base, _answered, batches, prefix, bodies, streams, *settings, progress=progress), strict=True
    ):
        for i, answer in zip(index, answered, strict=True):
            answers[i] = answer
    return answers


@torch.no_grad()
def _answered(
    base: Base,
    index: list[int],
    prefix: Prefix,
    bodies: Sequence[Sequence[int]],
    streams: dict[int, int],
    limit: int,
    stop: frozenset[int],
    temperature: float,
    keep_stop: bool,
) -> list[tuple[int, ...]]:
    """Answers of one batch; ``streams`` gives its seed by its first body."""
    rng = torch.Generator(device=base.device).manual_seed(streams[index[0]])
    return _decode(base, prefix, [bodies[i] for i in index], limit, stop, temperature, rng, keep_stop)


def stop_ids(base: Base) -> frozenset[int]:
    """Ids that end an answer: those of the model's generation config and the tokenizer's EOS.

    Some chat models end a turn with another token: add the last id of a gold output that was encoded with its end.
    """
    configured: Any = getattr(base.model.generation_config, "eos_token_id", None)
    ids = {configured} if isinstance(configured, int) else set(configured or ())
    return frozenset((ids | {base.tokenizer.eos_token_id}) - {None})


def answer_text(base: Base, ids: Sequence[int]) -> str:
    """The text of an answer, with control tokens left out."""
    return base.tokenizer.decode(list(ids), skip_special_tokens=True)


def _batches(bodies: Sequence[Sequence[int]], size: int, equal_lengths: bool) -> Iterator[list[int]]:
    """Positions of bodies, shortest first, at most ``size`` at a time."""
    order = sorted(range(len(bodies)), key=lambda i: (len(bodies[i]), i))
    groups = groupby(order, key=lambda i: len(bodies[i]) if equal_lengths else 0)
    for _, members in groups:
        group = list(members)
        yield from (group[start : start + size] for start in range(0, len(group), size))


def _decode(
    base: Base,
    prefix: Prefix,
    bodies: Sequence[Sequence[int]],
    limit: int,
    stop: frozenset[int],
    temperature: float,
    rng: torch.Generator,
    keep_stop: bool,
) -> list[tuple[int, ...]]:
    rows, width, length = len(bodies), max(map(len, bodies)), len(prefix)
    ids = torch.zeros(rows, width, dtype=torch.long)
    mask = torch.zeros(rows, length + width, dtype=torch.long)
    mask[:, :length] = 1
    for row, body in enumerate(bodies):
        ids[row, width - len(body) :] = torch.tensor(body)
        mask[row, length + width - len(body) :] = 1
    ids, mask = ids.to(base.device), mask.to(base.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, length:]
    cache = _growing_cache(prefix, rows, width + limit)
    ends = torch.tensor(sorted(stop), device=base.device)
    finished = torch.zeros(rows, dtype=torch.bool, device=base.device)
    chosen: list[Tensor] = []
    packed = _packed_start(base, prefix, bodies, cache)
    while len(chosen) < limit:
        if packed is not None:
            hidden, packed = packed, None
        else:
            hidden = base.backbone(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            ).last_hidden_state[:, -1]
        token = _choose(base, hidden, temperature, rng)
        before, finished = finished, finished | torch.isin(token, ends)
        chosen.append(torch.where(before if keep_stop else finished, -1, token))
        if bool(finished.all()):
            break
        ids = token[:, None]
        mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
        positions = positions[:, -1:] + 1
    tokens = torch.stack(chosen, dim=1).tolist() if chosen else [[]] * rows
    return [tuple(token for token in row if token >= 0) for row in tokens]


def _packed_start(base: Base, prefix: Prefix, bodies: Sequence[Sequence[int]], cache: Cache) -> Tensor | None:
    """Runs the bodies as packed rows and puts their keys and values into ``cache``, right-aligned as if they were
    padded on the left; hidden states [B, D] of their last tokens. None, and nothing done, where padding is cheaper.
    """
    lengths = [len(body) for body in bodies]
    packing = line_for(base, lengths, len(prefix)) or lines_for(base, lengths, len(prefix))
    if packing is None:
        return None
    ids = pad_sequence([torch.tensor(body) for body in bodies], batch_first=True).to(base.device)
    seen = Cache(layers=[KeepingLayer(k, v) for k, v in zip(prefix.keys, prefix.values, strict=True)])
    hidden = run_packed(base, prefix, ids, packing, seen)
    end = len(prefix) + max(lengths)
    for layer, states in zip(cache.layers, seen.layers, strict=True):
        for room, new in zip(layer.room, states.new, strict=True):
            for row, length in enumerate(lengths):
                line, column = int(packing.line[row]), int(packing.column[row])
                room[row, :, end - length : end] = new[line, :, column : column + length]
        layer.length = end
    return hidden[packing.places(torch.arange(len(bodies)), packing.lengths - 1)]


def _choose(base: Base, hidden: Tensor, temperature: float, rng: torch.Generator) -> Tensor:
    """Next token ids [B] from hidden states [B, D] after the final norm."""
    if temperature == 0:
        return base.head.most_likely(hidden)
    return torch.multinomial(torch.softmax(base.head.logits(hidden) / temperature, -1), 1, generator=rng)[:, 0]


class KeepingLayer(PrefixLayer):
    """A prefix's layer that remembers the keys and values that came after it, ``new``, a pair of [B, H, n, d]."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.new = key_states, value_states
        return super().update(key_states, value_states)


class GrowingLayer(DynamicLayer):
    """One layer's keys and values [B, H, T + room, d], allocated once: the prefix, then what every step adds."""

    def __init__(self, keys: Tensor, values: Tensor, rows: int, room: int):
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.length = keys.shape[-2]
        self.room = [repeat(pad(t, (0, 0, 0, room)), "h t d -> b h t d", b=rows).contiguous() for t in (keys, values)]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, self.length = self.length, self.length + key_states.shape[-2]
        for place, states in zip(self.room, (key_states, value_states), strict=True):
            place[:, :, start : self.length] = states
        self.keys, self.values = (place[:, :, : self.length] for place in self.room)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length


def _growing_cache(prefix: Prefix, rows: int, room: int) -> Cache:
    """A cache that starts as the prefix, once for each row, with room for body and answer; sliding-window layers keep
    everything, the mask decides.
    """
    pairs = zip(prefix.keys, prefix.values, strict=True)
    return Cache(layers=[GrowingLayer(keys, values, rows, room) for keys, values in pairs])
