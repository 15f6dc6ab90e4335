"""The connector as vLLM's V1 engine calls it (``KVConnectorBase_V1``): thin, over :mod:`.server`.

Run on vLLM 0.32, CPU build (``tools/serving_check.sh``); not on a GPU. vLLM is imported when it asks for the class.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .server import Load, Server


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
            if getattr(role, "name", role) == "SCHEDULER":
                self._server.check_base(vllm_config.model_config)
            self._caches: dict[str, Tensor] = {}
            self._refused: set[int] = set()
            compilation = getattr(vllm_config, "compilation_config", None)
            self._modules = getattr(compilation, "static_forward_context", None) or {}

        # ---- scheduler

        def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
            return self._server.matched(request, num_computed_tokens), False

        def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
            self._server.remember(request, blocks, num_external_tokens)

        def build_connector_meta(self, scheduler_output: Any) -> Any:
            loads, self._server.pending = list(self._server.pending.values()), {}
            return made()["KvoptMetadata"](loads)

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
                if load.context is None:
                    self._refused |= self._server.refused_blocks(load)
                else:
                    self._server.write(load, caches, modules, _rank())

        def get_block_ids_with_load_errors(self) -> set[int]:
            refused, self._refused = self._refused, set()
            return refused

        def wait_for_layer_load(self, layer_name: str) -> None:
            return

        def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
            return

        def wait_for_save(self) -> None:
            return

    for cls in (KvoptMetadata, KvoptConnector):
        cls.__qualname__, cls.__module__ = cls.__name__, __package__ or __name__  # so that pickle finds them
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


def made() -> dict[str, Any]:
    """The connector and its metadata by name."""
    if not _MADE:
        _MADE.update(_classes())
    return _MADE
