"""An item of ``contexts`` that stands for many: text, soft prompt and KV cache at the same lengths."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field

from kvopt.config.contexts import ContextConfig
from kvopt.config.section import NAME
from kvopt.config.shortening import Lengths, ShorteningConfig

FrontierKind = Literal["text", "soft", "kv"]
FRONTIER_KINDS: tuple[FrontierKind, ...] = get_args(FrontierKind)
LEARNED: tuple[Literal["soft", "kv"], ...] = ("soft", "kv")
BATCH, EVERY = 8, 10
RATES = {"kv": 0.002, "soft": 0.01}


class FrontierConfig(ShorteningConfig):
    """The shortest that a template can get: contexts of each kind at each of some lengths.

    They are named by kind and length: ``short-64`` (the template's own text, shortened), ``soft-64`` (a soft prompt
    that starts from that text) and ``kv-64`` (a KV cache that starts from attention matching).
    """

    kind: Literal["frontier"]
    name: str = Field("frontier", pattern=NAME, description="only used to find this item, as in --set")
    tokens: Lengths = Field(min_length=1, description="the lengths to compare at")
    kinds: tuple[FrontierKind, ...] = Field(FRONTIER_KINDS, min_length=1, description="which kinds to compare")
    steps: int = Field(40, ge=0, description="optimizer steps of each soft prompt and KV cache")

    @property
    def texts(self) -> dict[str, int]:
        """Names of the shorter texts, longest first, with their lengths; empty without texts."""
        return {f"short-{length}": length for length in self.tokens} if "text" in self.kinds else {}

    def learned(self) -> list[ContextConfig]:
        """The soft prompts and KV caches that this item stands for."""
        kinds = [kind for kind in LEARNED if kind in self.kinds]
        return [learned_context(kind, length, self.steps, self.how) for kind in kinds for length in self.tokens]


def learned_context(
    kind: Literal["soft", "kv"], tokens: int, steps: int, how: ShorteningConfig | None = None
) -> ContextConfig:
    """The soft prompt (from a text found as ``how`` says) or the KV cache of a frontier at one length."""
    changed = how.model_dump(exclude_defaults=True) if how else {}
    text = {"kind": "shortened", "tokens": tokens, **changed} if changed else f"extract:{tokens}"
    return ContextConfig(
        name=f"{kind}-{tokens}",
        kind=kind,
        tokens=tokens if kind == "kv" else None,
        init="matched" if kind == "kv" else text,
        steps=steps,
        batch_size=BATCH,
        optimizer="adamw" if kind == "kv" else "muon",
        learning_rate=RATES[kind],
        frozen=min(1, tokens - 1),
        eval_every=EVERY,
    )
