"""The ``model`` section: which base, and how it runs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from kvopt.config.section import Section

BUILTIN_BASE = "smollm2-135m"
"""The base that kvopt finds without a hub: SmolLM2-135M-Instruct."""


class ModelConfig(Section):
    """The base model, and how it runs."""

    base: str = Field(BUILTIN_BASE, description="smollm2-135m (built in), a hub id, a model folder or a .gguf file")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 where the hardware computes in it, else float32"
    )
    device: str = Field(
        "auto",
        description="cpu, cuda, xpu or mps, with an index for one of several (cuda:1); auto: cuda, else xpu, else mps,"
        " else cpu",
    )
    quantization: Literal["nf4", "int8"] | dict[str, Any] | None = Field(
        None,
        description="fewer bits a weight, as the model is loaded: nf4 or int8 (bitsandbytes), or any mapping that is"
        " transformers' quantization_config, with its quant_method (torchao, …)",
    )
    shard: Literal["fsdp2"] | None = Field(
        None,
        description="fsdp2: in a launch of several processes, each keeps its part of every decoder layer, for a base"
        " that does not fit one device",
    )
    trust_remote_code: bool = Field(False, description="allow Python code that comes with the model to run")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    attention: Literal["auto", "packed", "padded"] = Field(
        "auto",
        description="how the rows of a batch stand behind a shared prefix. packed: one after the other in one line, by"
        " FlexAttention on a CUDA GPU; padded: each in a line of its own. auto: packed on a CUDA GPU if FlexAttention"
        " passes a check of itself; on a CPU if attention to the prefix and within rows can be computed apart, or where"
        " packing saves work; else padded",
    )
    attn_implementation: str = Field(
        "auto",
        description="the attention of transformers (its attn_implementation); auto: sdpa where the model's attention"
        " can be computed so, else eager. One that is named is used for packed rows, too, in place of FlexAttention, or"
        " on a CPU of the two attentions to prefix and row",
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, more time"
    )

    @field_validator("quantization")
    @classmethod
    def _names_its_method(cls, value: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
        if isinstance(value, dict) and not value.get("quant_method"):
            raise ValueError("a mapping needs its quant_method, such as bitsandbytes or torchao")
        return value

    @model_validator(mode="after")
    def _shards_plain_weights(self) -> ModelConfig:
        if self.shard and self.quantization is not None:
            raise ValueError("shard and quantization do not go together: set one of them")
        return self

    @model_validator(mode="before")
    @classmethod
    def _older_attention(cls, tree: Any) -> Any:
        """``attention`` named the attention of transformers before there was a key of its own for it."""
        if not isinstance(tree, dict) or tree.get("attention", "auto") in ("auto", "packed", "padded"):
            return tree
        if "attn_implementation" in tree:
            raise ValueError(f"attention is auto, packed or padded, not {tree['attention']!r}")
        return tree | {"attention": "auto", "attn_implementation": tree["attention"]}
