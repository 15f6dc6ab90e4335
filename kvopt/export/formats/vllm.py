"""``--to vllm``: a KV context for vLLM's paged cache, with the connector that serves it
(:mod:`kvopt.export.vllm_connector`).
"""

from __future__ import annotations

import hashlib
from importlib import resources
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from kvopt.documents.export_record import ExportFacts
from kvopt.errors import InputError, counted
from kvopt.export.export_format import ExportFormat, Written, base_lines, ids_lines

if TYPE_CHECKING:
    from pathlib import Path

    from kvopt.export.source import Source

SNIPPET = """\
import json
from pathlib import Path

from transformers import AutoTokenizer

{base}
tokenizer = AutoTokenizer.from_pretrained(base)
{ids}
whole = json.loads(Path("vllm.json").read_text("utf-8"))["placeholder_ids"] + ids
print(json.dumps({{"model": base, "prompt": whole, "max_tokens": 64, "temperature": 0.0}}))  # POST to /v1/completions
"""

SERVE = """\
`PYTHONPATH=. vllm serve MODEL --kv-transfer-config '{"kv_connector": "KvoptConnector", "kv_role": "kv_consumer",\
 "kv_connector_module_path": "kvopt_vllm_connector", "kv_connector_extra_config": {"contexts": ["."]}}'` from this\
 folder (give several folders to serve several contexts)."""


class VllmFormat(ExportFormat):
    """A KV context for vLLM's paged cache."""

    takes: ClassVar[tuple[str, ...]] = ("kv", "soft")
    rank: ClassVar[int] = 6
    caution: ClassVar[str] = "the vLLM connector was run on vLLM's CPU build (0.32), not on a GPU"
    kind: Literal["vllm"] = "vllm"
    block_size: int = Field(16, ge=1, description="tokens in a block of the server's cache")
    partial_block: bool = Field(True, description="allow a last block that is not full, as vLLM from 0.32 on loads it")

    def write(self, source: Source, place: Path) -> Written:
        """``prefix.safetensors``, ``vllm.json`` with the placeholder ids, and the connector. Raises InputError when the
        slots do not fill blocks.
        """
        from kvopt.export.source import write_prefix
        from kvopt.export.vllm_connector import check_blocks
        from kvopt.storage.files import sha256_bytes, write_bytes, write_json

        states = source.states
        slots, layers, _, heads, width = states.shape
        try:
            check_blocks(source.name, slots, self.block_size, self.partial_block)
        except ValueError as error:
            raise InputError(str(error), where="--block-size", fix="or allow a partial block") from None
        write_prefix(states, place)
        digest = sha256_bytes(str(tuple(states.shape)).encode() + states.contiguous().numpy().tobytes())
        facts: dict[str, Any] = {
            "name": source.name,
            "tokens": slots,
            "layers": layers,
            "kv_heads": heads,
            "head_dim": width,
            "placeholder_ids": placeholder_ids(digest, slots, source.base_name),
        }
        write_json(place / "vllm.json", facts)
        write_bytes(
            place / "kvopt_vllm_connector.py", (resources.files("kvopt.export") / "vllm_connector.py").read_bytes()
        )
        return Written(
            summary=f"A KV context of {counted(slots, 'slot')} for vLLM, with the connector that serves it.",
            snippet=SNIPPET.format(base=base_lines(source.base_name), ids=ids_lines(source)),
            library="vllm",
            notes=(
                SERVE,
                "A prompt of token ids that begins with the placeholder ids of `vllm.json` gets the context; any other"
                " prompt is served as usual. Without the connector the placeholders are meaningless text.",
                f"{_filled(slots, self.block_size)}; tensor parallelism works for sizes that divide"
                f" {heads} key/value heads or are multiples of it. Repetition penalties would count the placeholders.",
                "vLLM ignores the context, without an error, where a request asks for `prompt_logprobs` or `echo`, or"
                " where the placeholders arrive as text that is tokenized again: send token ids.",
                "Run on vLLM 0.32, CPU build: greedy answers equal kvopt's (`tools/serving_check.sh`). Not on a GPU.",
            ),
            facts=ExportFacts(block_size=self.block_size, partial_block=self.partial_block),
        )


def _filled(slots: int, block_size: int) -> str:
    rest = slots % block_size
    if not rest:
        return f"The slots fill blocks of {block_size}"
    return f"The slots fill the last block of {block_size} in part ({rest}), which vLLM loads from 0.32 on"


def placeholder_ids(digest: str, count: int, base: str) -> list[int]:
    """Ordinary token ids drawn from the context's hash: equal contexts get equal ones, so prefix caching is right."""
    from kvopt.base.loading import load_tokenizer
    from kvopt.config.model import ModelConfig

    tokenizer, _ = load_tokenizer(ModelConfig(base=base))
    special = set(tokenizer.all_special_ids)
    ordinary = [token for token in range(len(tokenizer)) if token not in special]
    draws = (hashlib.sha256(f"{digest}:{i}".encode()).digest() for i in range(count))
    return [ordinary[int.from_bytes(draw[:8], "big") % len(ordinary)] for draw in draws]
