"""``--to vllm``: a KV context for vLLM's paged cache, with the connector that serves it
(:mod:`kvopt.export.vllm_connector`).
"""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from kvopt.documents.export_record import ExportFacts
from kvopt.errors import InputError, counted
from kvopt.export.export_format import ExportFormat, Written, base_lines, ids_lines

if TYPE_CHECKING:
    from pathlib import Path

    from kvopt.export.chat_form import ChatForm
    from kvopt.export.source import Source

SNIPPET = """\
import json
from pathlib import Path

from transformers import AutoTokenizer

{base}
tokenizer = AutoTokenizer.from_pretrained(base)
{ids}
whole = json.loads(Path("vllm.json").read_text("utf-8"))["placeholder_ids"] + ids
request = {{"model": base, "prompt": whole, "max_tokens": 64, "temperature": 0.0, "vllm_xargs": {{"kvopt": "{name}"}}}}
print(json.dumps(request))  # POST to /v1/completions
"""

SERVE = """\
PYTHONPATH=. vllm serve MODEL {chat}--kv-transfer-config '{{"kv_connector": "KvoptConnector", "kv_role": "kv_consumer",
  "kv_connector_module_path": "kvopt_vllm_connector", "kv_connector_extra_config": {{"contexts": ["."]}}}}'
"""

CHAT = """\
python -m kvopt_vllm_connector --base MODEL . > chat.jinja
{serve}
curl -s localhost:8000/v1/chat/completions -H "Content-Type: application/json" -d '{{"model": "MODEL",
  "messages": [{{"role": "user", "content": "YOUR MESSAGE"}}],
  "chat_template_kwargs": {{"kvopt": "{name}"}}, "vllm_xargs": {{"kvopt": "{name}"}}}}'
"""


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
        from kvopt.base.loading import load_tokenizer
        from kvopt.config.model import ModelConfig
        from kvopt.export.chat_form import chat_form
        from kvopt.export.placeholders import placeholders
        from kvopt.export.source import write_prefix
        from kvopt.export.vllm_connector.stored_context import check_blocks
        from kvopt.storage.files import sha256_bytes, write_json

        states = source.states
        slots, layers, _, heads, width = states.shape
        try:
            check_blocks(source.name, slots, self.block_size, self.partial_block)
        except ValueError as error:
            raise InputError(str(error), where="--block-size", fix="or allow a partial block") from None
        write_prefix(states, place)
        digest = sha256_bytes(str(tuple(states.shape)).encode() + states.contiguous().numpy().tobytes())
        tokenizer, _ = load_tokenizer(ModelConfig(base=source.base_name))
        made = placeholders(digest, slots, tokenizer)
        form = chat_form(source, made, tokenizer)
        stored = source.record.base if source.record else None
        hashes = {what: getattr(stored, what, None) for what in ("weights", "config")}
        facts: dict[str, Any] = {
            "name": source.name,
            "tokens": slots,
            "layers": layers,
            "kv_heads": heads,
            "head_dim": width,
            "placeholder_ids": made.ids,
            "marker": made.marker,
            "placeholder_text": made.text,
            **form.facts,
            "base": {what: digest for what, digest in hashes.items() if digest},
        }
        write_json(place / "vllm.json", facts)
        copy_connector(place / "kvopt_vllm_connector")
        return Written(
            summary=f"A KV context of {counted(slots, 'slot')} for vLLM, with the connector that serves it.",
            snippet=SNIPPET.format(base=base_lines(source.base_name), ids=ids_lines(source), name=source.name),
            library="vllm",
            commands=_commands(source.name, form),
            notes=(
                "Give several folders as `contexts`, and to `kvopt_vllm_connector`, to serve several contexts.",
                *_of_chat(form),
                "A prompt of token ids that begins with the placeholder ids of `vllm.json` gets the context; any other"
                " prompt is served as usual. Without the connector the placeholders are meaningless text."
                f" {_named(source.name)}",
                f"{_filled(slots, self.block_size)}; tensor parallelism works for sizes that divide"
                f" {heads} key/value heads or are multiples of it. Repetition penalties would count the placeholders.",
                "The server ends a misused request with an error (status 500, `finish_reason: error` in process) and"
                " writes the reason into its log: `prompt_logprobs`, `echo` with `logprobs`, nothing behind the"
                " placeholders, placeholders that were changed (a BOS before them, text that is tokenized again), a"
                " context that it does not have. Another base is refused at the start.",
                "Run on vLLM 0.32, CPU build: greedy answers equal kvopt's (`tools/serving_check.sh`). Not on a GPU.",
            ),
            facts=ExportFacts(block_size=self.block_size, partial_block=self.partial_block),
        )


def copy_connector(place: Path) -> None:
    """The connector as a package of its own, which imports nothing of kvopt."""
    from kvopt.storage.files import write_bytes

    place.mkdir()
    for file in (resources.files("kvopt.export") / "vllm_connector").iterdir():
        if file.name.endswith(".py"):
            write_bytes(place / file.name, file.read_bytes())


def _commands(name: str, form: ChatForm) -> str:
    if form.why:
        return SERVE.format(chat="")
    return CHAT.format(serve=SERVE.format(chat="--chat-template chat.jinja "), name=name)


def _of_chat(form: ChatForm) -> tuple[str, ...]:
    if form.why:
        return (f"There is no chat form: {form.why}. Use /v1/completions with token ids.",)
    return (
        "In a chat, the user's message is what stands in the template from its first slot to the end of that message:"
        " the context stands for all before it.",
    )


def _named(name: str) -> str:
    return f'Add `"vllm_xargs": {{"kvopt": "{name}"}}`, and a request that would not get {name} is an error.'


def _filled(slots: int, block_size: int) -> str:
    rest = slots % block_size
    if not rest:
        return f"The slots fill blocks of {block_size}"
    return f"The slots fill the last block of {block_size} in part ({rest}), which vLLM loads from 0.32 on"
