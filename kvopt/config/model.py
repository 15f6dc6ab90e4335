"""The ``model`` section: which base, and how it runs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kvopt.config.section import Section

BUILTIN_BASE = "smollm2-135m"
"""The base that kvopt finds without a hub: SmolLM2-135M-Instruct."""


class ModelConfig(Section):
    """The base model, and how it runs."""

    base: str = Field(BUILTIN_BASE, description="smollm2-135m (built in), a hub id, a model folder or a .gguf file")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 where the hardware computes in it, else float32"
    )
    device: str = Field("auto", description="auto: cuda, else mps, else cpu")
    trust_remote_code: bool = Field(False, description="allow Python code that comes with the model to run")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    attention: str = Field(
        "auto",
        description="attention implementation of transformers (attn_implementation); auto: sdpa where the model's"
        " attention can be computed so, else eager",
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, more time"
    )
