"""A vLLM KV connector that serves trained KV contexts, chosen per request by the prompt's first tokens.

    PYTHONPATH=FOLDER vllm serve MODEL --kv-transfer-config '{"kv_connector": "KvoptConnector",
      "kv_role": "kv_consumer", "kv_connector_module_path": "kvopt_vllm_connector",
      "kv_connector_extra_config": {"contexts": ["FOLDER"]}}'

A context of T slots is asked for by a prompt of token ids that begins with its T placeholder ids (``vllm.json``). They
are drawn from the hash of the context's content, so vLLM's own prefix cache, which keys blocks by token ids, never
mixes contexts up with each other or with text. Keys and values are written into the request's blocks before the first
forward pass, and prefill starts at the body.

This folder is copied into exports as ``kvopt_vllm_connector``: it imports nothing of kvopt, and vLLM only in
``engine``. Needs torch and safetensors.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name in ("KvoptConnector", "KvoptMetadata"):
        from .engine import made

        return made()[name]
    raise AttributeError(name)
