"""Which attention implementation of transformers computes a base, and whether the base can be computed so: one rule,
with the weights and without them.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from kvopt.base.probe import text_config
from kvopt.config.model import ModelConfig
from kvopt.errors import InputError


def implementation(config: ModelConfig, settings: Any) -> str | None:
    """What transformers is asked for; None leaves it the choice, which is sdpa for the models that can and eager for
    those that cannot (attention sinks).

    Raises InputError for sdpa where the attention's logits have a softcap, which sdpa leaves out or refuses.
    """
    softcap = getattr(text_config(settings), "attn_logit_softcapping", None)
    if config.attn_implementation == "auto":
        return "eager" if softcap else None
    if softcap and config.attn_implementation == "sdpa":
        raise refused(config, settings, "its softcap is not in sdpa")
    return config.attn_implementation


def check_implementation(config: ModelConfig, settings: Any) -> None:
    """Ask transformers for the model without its weights. Raises InputError where it refuses the attention."""
    asked = implementation(config, settings)
    if config.attn_implementation in ("auto", "eager"):
        return
    from transformers import AutoModelForCausalLM  # takes seconds, and is not needed without a wish

    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(
                copy.deepcopy(settings), attn_implementation=asked, trust_remote_code=config.trust_remote_code
            )
    except Exception as error:  # a model fails in as many ways as there are architectures
        if is_refusal(error):
            raise refused(config, settings, reason(error)) from error


def is_refusal(error: Exception) -> bool:
    """Whether what transformers raised is about the attention implementation."""
    return "attn_implementation" in str(error) or (isinstance(error, ImportError) and "attention" in str(error).lower())


def reason(error: Exception) -> str:
    """What is missing here, where it is a library; what transformers says of the architecture is many lines long."""
    return " ".join(str(error).split()) if isinstance(error, ImportError) else ""


def refused(config: ModelConfig, settings: Any, why: str = "") -> InputError:
    """The error for an attention implementation that a base cannot be computed with."""
    name = type(settings).__name__.removesuffix("Config")
    return InputError(
        f"{name} cannot be computed with this attention" + (f": {why}" if why else ""),
        where=f"model.attn_implementation {config.attn_implementation}",
        fix="set model.attn_implementation: eager, or auto",
    )
