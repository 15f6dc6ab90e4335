"""The paged cache of an attention layer: where a request's slots are in it, and how keys and values get there.

Keys and values reach it through the attention backend's own writer (``impl.do_kv_cache_update``), which knows how its
kernels lay a block out; no two backends agree on that, and the CPU's packs it for the instruction set. Versions of vLLM
without such a writer (0.9 to 0.11) have one of two layouts of a layer's B blocks of N slots, H heads of d:
[2, B, N, H, d] (FlashAttention) and [B, 2, N, H, d] (FlashInfer, Triton). Any other cache is refused when the server
starts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def paged_slots(block_ids: Sequence[int], block_size: int, start: int, stop: int) -> Tensor:
    """Places [stop − start] int64 in the paged cache, counted in slots, of a request's positions ``start`` to ``stop``.

    Raises ValueError when the blocks do not reach that far.
    """
    if stop > len(block_ids) * block_size:
        raise ValueError(f"{len(block_ids)} blocks of {block_size} do not hold position {stop - 1}")
    positions = torch.arange(start, stop)
    return torch.tensor(list(block_ids))[positions // block_size] * block_size + positions % block_size


def paged_views(cache: Tensor, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Views [B, N, H, d] of the keys and the values in one layer's paged cache, whichever layout it has.

    Raises ValueError for a layout that is not known, or for a cache of integers or 8-bit floats.
    """
    if cache.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"the KV cache is {cache.dtype}; contexts are served in 16- or 32-bit floats only")
    shape = tuple(cache.shape)
    if cache.ndim == 5 and shape[3:] == (kv_heads, head_dim) and 2 in shape[:2] and shape[:2] != (2, 2):
        pair = cache.unbind(0 if shape[0] == 2 else 1)
        return pair[0], pair[1]
    raise ValueError(f"unknown layout of the KV cache: {list(shape)} for {kv_heads} heads of {head_dim}")


def write_slots(cache: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Put ``keys`` and ``values`` [H, n, d] into one layer's paged cache at ``slots`` [n] (:func:`paged_slots`).

    Blocks of the cache may be parts of the scheduler's blocks: slots are counted through, so both agree.
    """
    for view, new in zip(paged_views(cache, keys.shape[0], keys.shape[2]), (keys, values), strict=True):
        size = view.shape[1]
        places = slots.to(view.device)
        view[places // size, places % size] = new.transpose(0, 1).to(view.device, view.dtype)


def check_writable(name: str, layer: Any, cache: Tensor, kv_heads: int, head_dim: int) -> None:
    """Raise ValueError for a layer whose cache cannot be filled: neither a writer of its backend nor a known layout."""
    if cache.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name}: the KV cache is {cache.dtype}; contexts are served in 16- or 32-bit floats only")
    if writer_of(layer) is None:
        try:
            paged_views(cache, kv_heads, head_dim)
        except ValueError as error:
            backend = type(getattr(layer, "impl", layer)).__name__
            raise ValueError(f"{name}: {error}, and {backend} of this vLLM has no do_kv_cache_update") from None


def writer_of(layer: Any) -> Any:
    """The writer of a layer's attention backend: ``(layer, keys, values, cache, slots)``; None where it has none."""
    return getattr(getattr(layer, "impl", None), "do_kv_cache_update", None)


def write_layer(layer: Any, cache: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Put ``keys`` and ``values`` [H, n, d] into a layer's cache, through the backend's writer where it has one."""
    writer = writer_of(layer)
    if writer is None:
        write_slots(cache, keys, values, slots)
        return
    keys, values = (new.transpose(0, 1).to(cache.device, cache.dtype).contiguous() for new in (keys, values))
    writer(layer, keys, values, cache, slots.to(cache.device))


def layer_index(name: str) -> int:
    """The number of a layer in vLLM's name for it, e.g. 12 in ``model.layers.12.self_attn.attn``."""
    layer = re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", f".{name}.")
    if layer is None:
        raise ValueError(f"no layer number in {name!r}")
    return int(layer[1])
