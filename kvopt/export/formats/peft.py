"""``--to peft``: a PEFT adapter. kv as CARTRIDGE (PEFT ≥ 0.19) or PREFIX_TUNING (the same tensor, for older ones), soft
as PROMPT_TUNING.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from kvopt.documents.context_record import SlotPositions
from kvopt.documents.export_record import ExportFacts
from kvopt.errors import InputError
from kvopt.export.export_format import ExportFormat, Written, base_lines, ids_lines

if TYPE_CHECKING:
    from pathlib import Path

    from kvopt.export.source import Source

PADDING = {
    "kv": "Pad batches on the left for generation; on models with sliding windows, use batches of equal length.",
    "soft": "PEFT drops position ids under PROMPT_TUNING and counts padding as positions: generate in batches of equal"
    " length. `kvopt export --to prompt-embeds` and `--to hf-cache` have no such limit.",
}

SNIPPET = """\
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

{base}
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), ".")  # this folder
{ids}
fed = torch.tensor([ids])
answer = model.generate(input_ids=fed, attention_mask=torch.ones_like(fed), max_new_tokens=64, do_sample=False)
print(tokenizer.decode(answer[0, len(ids) :], skip_special_tokens=True))
"""


class PeftFormat(ExportFormat):
    """A PEFT adapter."""

    takes: ClassVar[tuple[str, ...]] = ("kv", "soft")
    rank: ClassVar[int] = 1
    kind: Literal["peft"] = "peft"
    peft_type: str | None = Field(None, description="CARTRIDGE or PREFIX_TUNING (kv), PROMPT_TUNING (soft)")

    @field_validator("peft_type")
    @classmethod
    def _upper(cls, value: str | None) -> str | None:
        return value.upper() if value else None

    def write(self, source: Source, place: Path) -> Written:
        """The adapter, with kvopt.json beside it: the folder is a context that kvopt reads back too."""
        from einops import rearrange

        from kvopt.contexts.adapter import FORMAT_VERSION, KV_TYPES, RECORD
        from kvopt.contexts.context import KVContext, SoftContext
        from kvopt.contexts.folder import write_adapter
        from kvopt.documents.validated import write_document

        possible = KV_TYPES if source.kind == "kv" else ("PROMPT_TUNING",)
        peft_type = self.peft_type or possible[0]
        if peft_type not in possible:
            raise InputError(
                f"a {source.kind} context is not a {peft_type} adapter",
                where="--peft-type",
                fix="it can be " + " or ".join(possible),
            )
        fields: dict[str, Any] = {
            "peft_type": peft_type,
            "base_model_name_or_path": source.base_name,
            "num_virtual_tokens": source.tokens,
        }
        fields |= {name: source.config.get(name) for name in ("num_layers", "num_attention_heads", "token_dim")}
        tensor, context = source.tensor, None
        if source.kind == "kv":
            states = source.states
            tensor = rearrange(states, "t l two h d -> t (l two h d)")
            context = KVContext(source.name, states.contiguous())
            if peft_type == "CARTRIDGE":
                fields["num_frozen_tokens"] = source.config.get("num_frozen_tokens") or 0
        write_adapter(place, tensor, fields)
        if source.record is not None:
            digest = (context or SoftContext(source.name, tensor)).sha256()
            positions = SlotPositions(first=0, body=source.tokens)
            changed = {"format_version": FORMAT_VERSION, "content_sha256": digest, "positions": positions}
            write_document(place / RECORD, source.record.model_copy(update=changed))
        return Written(
            summary=f"A PEFT {peft_type} adapter: {source.tokens} {'KV slots' if context else 'input embeddings'}.",
            snippet=SNIPPET.format(base=base_lines(source.base_name), ids=ids_lines(source)),
            library="peft",
            notes=(
                "PEFT checks the shapes alone: on another base, even one of the same size, it answers nonsense without"
                " a warning. `kvopt.json` names the base by its hashes, and kvopt refuses another one.",
                PADDING[source.kind],
                "Use transformers before 5.24 with PEFT 0.21.2: 5.24 renamed the argument that carries the cache, and"
                " `generate` then leaves the adapter out without a warning (logits of a plain forward pass are right).",
            ),
            facts=ExportFacts(peft_type=peft_type),
        )
