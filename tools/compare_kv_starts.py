"""Short KV caches of the same lengths, before any training and after a few steps: a Markdown table.

    python tools/compare_kv_starts.py configs/snips.yaml --out runs/kv-starts --ratios 2.5 10 50 --steps 20

At every ratio (tokens of the template / slots) and for every start: the forward KL on the config's validation rows at
step 0 and with ``--steps`` the KL after so many steps; and the CPU seconds that the process took to make the start at
all lengths. Starts:

- *template*, *strided*, *matched*: kvopt's own (``init: …``); *keys moved* has ``key_steps: 40``, *own values*
  fits no values.
- *KVzip*: slots by the largest attention weight that any token of the template, repeated after itself, gives them
  (arXiv 2505.23416), with their own values; *refitted* fits them as matched does.
- *KVgrad*: by the largest w ‖v W_O‖ ‖∂Φ/∂a‖ over the same probe (openreview cg1wTCJjjk), where w is the attention
  weight, a the attention's output at the probe's token, and Φ the sum of the squared last hidden states; *KVgrad, rows*
  has the training rows as its probe.

Each head keeps as many slots as any other, because no cache format holds more for one than for another; the published
methods share them out over heads.
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from einops import einsum, rearrange
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvopt.base.attention import allowed_keys, replaced
from kvopt.base.loading import Base
from kvopt.base.prefix import Prefix, prefill, run_bodies
from kvopt.config.contexts import ContextConfig, Init
from kvopt.config.document import load_config
from kvopt.contexts.compaction import fewer_slots
from kvopt.learning.descent import optimize
from kvopt.learning.start_task import StartTask, initial_tensor
from kvopt.measure.score import score_prefix
from kvopt.run.descend import MATCHING_ROWS
from kvopt.run.run import Run
from kvopt.task.seam import Row, make_batch

REPEAT = "\n\nRepeat the previous context exactly."
CHUNK = 512
"""Tokens of the repeated template that are looked at together, as KVgrad has them."""
BATCH = 8
RATE, PLAIN_RATE = 0.002, 0.01
"""Learning rates of near starts, and of starts from plain tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="run directory (the reference is kept in it)")
    parser.add_argument("--ratios", type=float, nargs="+", default=[2.5, 10, 50])
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="starts; default: all")
    parser.add_argument("--set", action="append", default=[], dest="sets")
    options = parser.parse_args()
    config, base_dir = load_config(options.config, options.sets)
    with Run(config, base_dir, options.out).opened() as run:
        compare(run, options.ratios, options.steps, options.only)
    print(f"\npeak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


def compare(run: Run, ratios: Sequence[float], steps: int, only: Sequence[str] | None) -> None:
    task = run.task()
    base, ids = task.base, task.encoded.prefix
    train, selection, held_out = (task.bare_rows(split).rows for split in ("train", "selection", "validation"))
    reference, rows = run.whole_reference(), train[:MATCHING_ROWS]
    lengths = [max(1, round(len(ids) / ratio)) for ratio in ratios]
    none = run.score(task.none).kl_forward.mean
    print(f"\n{len(ids)} tokens, {len(train)} training rows, {len(held_out)} validation rows, {base.dtype};", end=" ")
    print(f"no context {none:.4f}\n")
    after = [f"{n} slots, {steps} steps" for n in lengths] if steps else []
    print(f"| start | {' | '.join([*(f'{n} slots' for n in lengths), 'CPU s', *after])} |")
    print("|---|" + "---|" * (len(lengths) + 1 + len(after)))
    for name, start in _starts(base, ids, rows).items():
        if only and name not in only:
            continue
        before = _cpu_seconds()
        tensors = [start(length).float() for length in lengths]
        seconds = _cpu_seconds() - before
        cells = [f"{_kl(base, tensor, held_out, reference):.4f}" for tensor in tensors] + [f"{seconds:.0f}"]
        rate = PLAIN_RATE if name in ("template", "strided") else RATE
        for tensor in tensors if steps else ():
            config = ContextConfig(
                name="c", tokens=len(tensor), steps=steps, batch_size=BATCH, learning_rate=rate, eval_every=steps
            )
            trained = optimize(base, tensor, config, train, selection, reference, seed=task.config.seed)
            cells.append(f"{_kl(base, trained.tensor, held_out, reference):.4f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def _kl(base: Base, tensor: Tensor, rows: Sequence[Row], reference: Any) -> float:
    return float(score_prefix(base, Prefix.unstack(tensor, base.dtype), rows, reference).kl.mean())


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _starts(base: Base, ids: Sequence[int], rows: Sequence[Row]) -> dict[str, Callable[[int], Tensor]]:
    with torch.no_grad():
        prefix = prefill(base, ids=torch.tensor(ids, device=base.device))

    def own(init: str | dict[str, Any]) -> Callable[[int], Tensor]:
        return lambda n: initial_tensor(Init(init).start, StartTask(base, "c", "kv", n, ids, rows))

    @cache
    def scores(probe: str, gradient: bool) -> Tensor:
        return importance(base, prefix, rows if probe == "rows" else repeats(base, ids), gradient=gradient)

    def kept(probe: str, *, gradient: bool, refit: bool) -> Callable[[int], Tensor]:
        return lambda n: fewer_slots(base, prefix, n, rows, refit=refit, importance=scores(probe, gradient))

    return {
        "matched": own("matched"),
        "matched, keys moved": own({"kind": "matched", "key_steps": 40}),
        "matched, own values": lambda n: fewer_slots(base, prefix, n, rows, refit=False),
        "KVzip": kept("repeat", gradient=False, refit=False),
        "KVzip, refitted": kept("repeat", gradient=False, refit=True),
        "KVgrad": kept("repeat", gradient=True, refit=False),
        "KVgrad, refitted": kept("repeat", gradient=True, refit=True),
        "KVgrad, rows, refitted": kept("rows", gradient=True, refit=True),
        "template": own("template"),
        "strided": own("strided"),
    }


def repeats(base: Base, ids: Sequence[int]) -> list[Row]:
    """The template's tokens once more, in chunks, each after a request to repeat it."""
    ask = tuple(base.tokenizer.encode(REPEAT, add_special_tokens=False))
    return [Row(f"repeat:{first}", ask, (*ids[first : first + CHUNK], ids[-1])) for first in range(0, len(ids), CHUNK)]


def importance(base: Base, prefix: Prefix, probe: Sequence[Row], *, gradient: bool) -> Tensor:
    """[L, H, P]: for each slot the largest value over the probe's tokens and the query heads of its key/value head, of
    the attention weight or, with ``gradient``, of KVgrad's score.
    """
    length, best = len(prefix), torch.zeros(base.geometry.layers, *prefix.keys[0].shape[:2])
    weights: dict[int, Tensor] = {}

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            grouped = rearrange(query, "1 (h g) n d -> h g n d", h=key.shape[1]).float()
            logits = einsum(grouped, key[0].float(), "h g n d, h m d -> h g n m")
            scaling = kwargs.get("scaling")
            logits = logits * (scaling if scaling is not None else query.shape[-1] ** -0.5)
            if mask is not None:
                logits = logits.masked_fill(~allowed_keys(mask[0, 0]), -torch.inf)
            seen = logits.softmax(-1)[..., :length]
            if gradient:
                front = einsum(
                    _output(module, seen.shape[:2]), value[0, :, :length].float(), "h g d o, h p d -> h g p o"
                )
                seen = seen * front.norm(dim=-1)[:, :, None]
            weights[module.layer_idx] = seen.to(torch.bfloat16)
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    for row in probe:
        batch = make_batch([row], [0]).to(base.device)
        with replaced(base, attention), torch.set_grad_enabled(gradient), _tapped(base, gradient) as tapped:
            run_bodies(base, prefix, batch)
            if gradient:
                tapped["last"].float().square().sum().backward()
        for layer, seen in weights.items():
            norms = tapped[layer].grad[0].float().norm(dim=-1)[:, None] if gradient else 1.0
            torch.maximum(best[layer], (seen.float() * norms).amax((1, 2)).cpu(), out=best[layer])
    return best


def _output(module: Any, heads: Sequence[int]) -> Tensor:
    """The output projection [H, g, d, D] of each query head."""
    return rearrange(module.o_proj.weight.float(), "o (h g d) -> h g d o", h=heads[0], g=heads[1])


@contextmanager
def _tapped(base: Base, gradient: bool) -> Iterator[dict[Any, Tensor]]:
    """The outputs of every layer's attention [1, n, D] by layer, and of the last layer as ``last``, with gradients."""
    found: dict[Any, Tensor] = {}

    def tap(name: Any) -> Callable[..., Any]:
        def hook(module: Any, inputs: Any, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            if not first.requires_grad:
                first.requires_grad_(True)
            first.retain_grad()
            found[name] = first

        return hook

    with ExitStack() as stack:
        if gradient:
            for place, layer in enumerate(base.backbone.layers):
                stack.callback(layer.self_attn.register_forward_hook(tap(place)).remove)
            stack.callback(base.backbone.layers[-1].register_forward_hook(tap("last")).remove)
        yield found


if __name__ == "__main__":
    main()
