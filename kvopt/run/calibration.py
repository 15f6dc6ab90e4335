"""How fast this machine computes a base: measured for seconds on two of its layers with random weights, and on the
divergence op.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kvopt.base.packing import Packing
from kvopt.base.prefix import Prefix, prefix_cache
from kvopt.base.probe import layer_types, text_config
from kvopt.base.workload import Gradient, Shape, Workload
from kvopt.kernels import Head, linear_kl
from kvopt.kernels.budget import wait_for
from kvopt.run.forecast import Forecast, Work

CALIBRATED_LAYERS, CALIBRATED_TOKENS, CALIBRATED_VOCABULARY = 2, 512, 32768
"""At most, so that a large base is measured in a small part of its memory."""


@dataclass(frozen=True)
class Rates:
    """FLOP/s of a stage's parts: passes forward, passes forward and back, products with the head."""

    forward: float
    backward: float
    head: float

    def seconds(self, work: Work) -> float:
        return work.forward / self.forward + work.backward / self.backward + work.head / self.head


def typical_shape(forecast: Forecast) -> Shape:
    """A batch like most of the run's: of its first descent, else of the reference."""
    rows = forecast.task.bare_rows("train").rows
    learned = [context for context in forecast.config.learned if context.steps]
    size = (learned[0].micro_batch_size or learned[0].batch_size) if learned else forecast.config.reference.batch_size
    slots = (learned[0].tokens if learned else None) or len(forecast.task.encoded.prefix)
    shape = forecast.shape_of(rows[:size], slots)
    if shape.pairs is None:
        return shape
    return Shape(len(rows[:size]), max(len(row) for row in rows[:size]), slots)  # without FlexAttention


def measured_rates(workload: Workload, shape: Shape, device: torch.device, seconds: float) -> Rates:
    """FLOP/s here: of two layers of the base with random weights, and of the divergence op."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(workload.model.config)
    text: Any = text_config(config)
    text.num_hidden_layers = min(CALIBRATED_LAYERS, workload.layers)
    text.vocab_size = min(2048, text.vocab_size)
    text.pad_token_id = None
    if getattr(text, "layer_types", None):
        text.layer_types = list(text.layer_types)[: text.num_hidden_layers]
    how: dict[str, Any] = {"dtype": workload.dtype, "attn_implementation": "eager" if workload.capped else "sdpa"}
    state = torch.random.get_rng_state()
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, **how).requires_grad_(False).eval()
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=workload.dtype, attn_implementation="eager")
    counting = Workload(empty.requires_grad_(False).eval(), workload.copies)
    rates = []
    gradients: tuple[Gradient, ...] = ("none", "prefix")
    for gradient in gradients:
        run = _layer_pass(model, counting, shape, device, gradient)
        rates.append(counting.flops(shape, gradient) / _median_seconds(run, device, seconds * 0.4))
    vocabulary = min(CALIBRATED_VOCABULARY, workload.vocab_size)
    head = Head(torch.randn(vocabulary, workload.hidden_size, device=device).mul_(0.02).to(workload.dtype))
    hidden = torch.randn(CALIBRATED_TOKENS // 2, workload.hidden_size, device=device).to(workload.dtype)
    other = (hidden + 0.1 * torch.randn_like(hidden)).requires_grad_()
    torch.random.set_rng_state(state)

    def products() -> None:
        linear_kl(other, hidden, head).loss.backward()

    flops = 3 * 2 * len(hidden) * workload.hidden_size * vocabulary
    return Rates(rates[0], rates[1], flops / _median_seconds(products, device, seconds * 0.2))


def _layer_pass(
    model: Any, counting: Workload, shape: Shape, device: torch.device, gradient: Gradient
) -> Callable[[], None]:
    sizes = shape.prefix, counting.layers, 2, counting.kv_heads, counting.head_dim
    slots = torch.randn(sizes, device=device).requires_grad_(gradient == "prefix")
    ids = torch.randint(counting.vocab_size, (shape.lines, shape.width), device=device)
    even = Packing(torch.arange(shape.lines), torch.zeros(shape.lines, dtype=torch.int64),
                   torch.full((shape.lines,), shape.width), shape.lines, shape.width)  # fmt: skip
    allowed = even.mask(shape.prefix).to(device)
    mask: Any = allowed
    if model.config._attn_implementation == "eager":
        low = torch.finfo(counting.dtype).min
        mask = torch.zeros_like(allowed, dtype=counting.dtype).masked_fill(~allowed, low)
    kinds = set(layer_types(text_config(model.config)))
    mask = dict.fromkeys(kinds, mask) if len(kinds) > 1 else mask
    positions = even.positions(shape.prefix).to(device)

    def run() -> None:
        slots.grad = None
        with torch.set_grad_enabled(gradient != "none"):
            cache = prefix_cache(Prefix.unstack(slots, counting.dtype)) if shape.prefix else None
            hidden = model.get_decoder()(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=False
            ).last_hidden_state
            if gradient != "none":
                hidden.float().square().mean().backward()

    return run


def _median_seconds(work: Callable[[], None], device: torch.device, budget: float) -> float:
    """Of one call, after a first one that is not counted, in about so many seconds."""
    work()
    begun = time.perf_counter()
    times: list[float] = []
    while not times or (time.perf_counter() - begun < budget and len(times) < 50):
        wait_for(device)
        start = time.perf_counter()
        work()
        wait_for(device)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]
