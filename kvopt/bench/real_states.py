"""Hidden states of a real model at several distances, to measure the divergence op on (``kvopt bench kl --real``).

The demo's template and validation rows give the reference. Candidates stand after the template's own KV cache with
noise added (relative to each layer's own size), and after no template at all. The model runs in float32, so that small
noise is not lost; the states are rounded afterwards to the dtype that is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from kvopt.base.loading import Base, load_base
from kvopt.base.prefix import Prefix, empty_prefix, gold_hidden
from kvopt.config.document import load_config
from kvopt.config.model import ModelConfig
from kvopt.contexts import TextContext
from kvopt.kernels import Head
from kvopt.task.builtin_data import stdlib_docstrings
from kvopt.task.examples import Example
from kvopt.task.seam import Encoder, make_batch
from kvopt.task.template_files import configured_template

NOISE = (1e-4, 1e-3, 1e-2, 0.2)
ROWS_PER_BATCH = 16


@dataclass(frozen=True)
class RealStates:
    """reference [N, D], candidates [N, D] by name from near to far, gold ids [N] int64, and the head."""

    reference: Tensor
    candidates: dict[str, Tensor]
    gold: Tensor
    head: Head


@torch.no_grad()
def real_states(
    tokens: int = 512, dtype: torch.dtype = torch.bfloat16, noise: Sequence[float] = NOISE, base: Base | None = None
) -> RealStates:
    """States of the first ``tokens`` gold tokens of the demo's validation rows, in ``dtype``, on the base's device.

    Args:
        noise: standard deviations of the noise on keys and values, as a share of theirs; seeded.
        base: a float32 base; by default the built-in one.
    """
    base = base or load_base(ModelConfig(dtype="float32"))
    with resources.as_file(resources.files("kvopt") / "configs" / "demo-full.yaml") as path:
        template = configured_template(load_config(path)[0].template, Path())[0]
    functions = stdlib_docstrings("validation")[: tokens // 4]
    examples = [Example(f"validation:{i}", {"code": f.code}, f.docstring, f.where) for i, f in enumerate(functions)]
    encoded = Encoder(base.tokenizer).encode(template, examples)
    original = TextContext("original", template, encoded).prefix(base)
    prefixes = {f"noise {size:g}": _noisy(original, size) for size in sorted(noise)}
    prefixes["no template"] = empty_prefix(base)
    states: dict[str, list[Tensor]] = {name: [] for name in ("original", *prefixes)}
    gold: list[Tensor] = []
    for start in range(0, len(encoded.rows), ROWS_PER_BATCH):
        rows = encoded.rows[start : start + ROWS_PER_BATCH]
        batch = make_batch(rows, range(len(rows))).to(base.device)
        gold.append(batch.gold)
        for name, prefix in {"original": original, **prefixes}.items():
            states[name].append(gold_hidden(base, prefix, batch))
        if sum(map(len, gold)) >= tokens:
            break
    rounded = {name: torch.cat(parts)[:tokens].to(dtype) for name, parts in states.items()}
    head = base.head
    head = Head(head.weight.detach().to(dtype), head.bias, head.scale, head.softcap, head.vocab)
    return RealStates(rounded.pop("original"), rounded, torch.cat(gold)[:tokens], head)


def _noisy(prefix: Prefix, size: float) -> Prefix:
    generator = torch.Generator().manual_seed(0)

    def moved(x: Tensor) -> Tensor:
        return x + size * x.std() * torch.randn(x.shape, generator=generator).to(x)

    return Prefix(tuple(map(moved, prefix.keys)), tuple(map(moved, prefix.values)))
