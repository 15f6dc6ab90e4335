"""What a base's passes cost, counted on a copy of it without weights (torch's meta device): products, memory.

A pass of P positions that attend to A pairs of positions takes a P + b A FLOPs: a and b are counted by
torch.utils.flop_counter on two small passes, so every architecture is counted as it computes. Softmaxes, norms and
element-wise work are no products and are left out, as that counter does.

Symbols: B lines, n positions of a line, T prefix slots, L layers, h key/value heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers.cache_utils import Cache

from kvopt.base.attention import computed_by
from kvopt.base.prefix import CaptureLayer, Prefix, prefix_cache
from kvopt.base.probe import decoder_layers, layer_types, text_config
from kvopt.errors import InputError
from kvopt.kernels.memory import AllocationMeter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

Gradient = Literal["none", "prefix", "inputs"]
"""What a pass gives a gradient to: nothing, the keys and values of the prefix, or input embeddings that keys and values
are made of (a soft prompt's).
"""


def _grouped_flops(rows: Any, weights: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Of rows [N, K], each times the matrix [K, M] of one expert."""
    return 2 * rows[0] * rows[1] * weights[-1]


EXPERTS = {torch.ops.aten._grouped_mm: _grouped_flops}
"""What torch.utils.flop_counter does not count by itself: the products of mixtures of experts."""


@dataclass(frozen=True)
class Shape:
    """Of a batch: B lines of n positions after T prefix slots; ``pairs`` of positions whose logits are computed, where
    not all are (FlexAttention; rows apart from their prefix on a CPU). Keys and values are not copied then.
    """

    lines: int
    width: int
    prefix: int
    pairs: int | None = None

    @property
    def positions(self) -> int:
        return self.lines * self.width

    @property
    def attended(self) -> int:
        """Pairs of positions whose logits are computed."""
        return self.positions * (self.prefix + self.width) if self.pairs is None else self.pairs


class Workload:
    """Costs of passes through one base.

    Args:
        model: on the meta device, no parameter requiring a gradient.
        copies: whether the attention copies keys and values for every query head that shares them, and the prefix for
            every line (a CPU does; FlexAttention does not).
    """

    def __init__(self, model: PreTrainedModel, copies: bool) -> None:
        self.model, self.copies = model, copies
        text: Any = text_config(model.config)
        self.layers: int = text.num_hidden_layers
        self.kv_heads: int = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        self.head_dim: int = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.hidden_size: int = text.hidden_size
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        self.capped = bool(getattr(text, "attn_logit_softcapping", None)) or model.config.model_type == "gpt_oss"
        self.plain = not self.capped and set(layer_types(text)) == {"full_attention"}
        self.plain &= not getattr(text, "attention_dropout", 0)
        self.dtype: torch.dtype = model.get_input_embeddings().weight.dtype

    @cached_property
    def weight_bytes(self) -> int:
        """Of all parameters and buffers, tied ones once."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())

    def sharded_bytes(self, processes: int) -> int:
        """Of the weights in one of so many processes that share out the decoder layers, at its peak: while it gathers
        the largest layer there are two copies of it.
        """
        layers = decoder_layers(self.model) or ()
        sizes = [sum(t.numel() * t.element_size() for t in layer.parameters()) for layer in layers]
        return self.weight_bytes - sum(sizes) + sum(sizes) // processes + 2 * max(sizes, default=0)

    @property
    def head_bytes(self) -> int:
        """Of the output head."""
        return self.vocab_size * self.hidden_size * self.dtype.itemsize

    def context_bytes(self, slots: int) -> int:
        """Of the keys and values of so many slots, in the model's dtype."""
        return slots * self.layers * 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    def head_flops(self, gold: int, products: int) -> int:
        """Of so many products of gold positions with the output head."""
        return 2 * gold * self.hidden_size * self.vocab_size * products

    def flops(self, shape: Shape, gradient: Gradient = "none") -> int:
        """Of one pass, its way back included where there is a gradient."""
        if shape.positions == 0:
            return 0
        by_position, by_pair = self._coefficients(gradient)
        return by_position * shape.positions + by_pair * shape.attended

    def saved_bytes(self, shape: Shape, gradient: Gradient) -> int:
        """Of the activations that a pass keeps for the way back."""
        sizes: dict[int, int] = {}
        weights = {p.untyped_storage()._cdata for p in (*self.model.parameters(), *self.model.buffers())}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                kept.append(tensor)  # so that no other storage takes its address
                sizes[storage._cdata] = storage.nbytes()
            return tensor

        kept: list[Tensor] = []
        with self._fused(shape), saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = self._run(shape, gradient)
        del hidden
        return sum(sizes.values())

    def passing_bytes(self, shape: Shape) -> int:
        """The most that a pass without a gradient holds at a time."""
        with self._fused(shape), AllocationMeter() as meter:
            self._run(shape, "none")
        return meter.peak

    # ---- counting

    def _coefficients(self, gradient: Gradient) -> tuple[int, int]:
        if gradient not in self._counted:
            small = (Shape(1, 8, 4), Shape(1, 8, 36)) if gradient != "inputs" else (Shape(1, 8, 0), Shape(1, 24, 0))
            first, second = (self._flops_of(shape, gradient) for shape in small)
            (p, q), (a, b) = [s.positions for s in small], [s.attended for s in small]
            determinant = p * b - q * a
            by_position, by_pair = (first * b - second * a) // determinant, (p * second - q * first) // determinant
            self._counted[gradient] = by_position, by_pair
        return self._counted[gradient]

    @cached_property
    def _counted(self) -> dict[str, tuple[int, int]]:
        return {}

    def _flops_of(self, shape: Shape, gradient: Gradient) -> int:
        with FlopCounterMode(display=False, custom_mapping=EXPERTS) as counter:
            hidden = self._run(shape, gradient)
            if gradient != "none":
                hidden.sum().backward()
        return int(counter.get_total_flops())

    def _run(self, shape: Shape, gradient: Gradient) -> Tensor:
        """What the way back begins at: hidden states, or the keys and values of a soft prompt."""
        lines, width, prefix = shape.lines, shape.width, shape.prefix
        slots = torch.empty(
            prefix, self.layers, 2, self.kv_heads, self.head_dim, device="meta", requires_grad=gradient == "prefix"
        )
        inputs: dict[str, Tensor] = {"input_ids": torch.zeros(lines, width, dtype=torch.int64, device="meta")}
        if gradient == "inputs":
            embeddings = torch.empty(lines, width, self.hidden_size, dtype=self.dtype, device="meta")
            inputs = {"inputs_embeds": embeddings.requires_grad_()}
        sizes = (lines, 1, width, prefix + width)
        stored = (1, 1, 1, 1) if shape.pairs is not None else sizes  # block masks are small
        mask: Any = torch.zeros(stored, dtype=self._mask_dtype, device="meta").expand(sizes)
        kinds = set(layer_types(text_config(self.model.config)))
        mask = dict.fromkeys(kinds, mask) if len(kinds) > 1 else mask
        backbone: Any = self.model.get_decoder()
        with torch.set_grad_enabled(gradient != "none"):
            try:
                cache: Any = prefix_cache(Prefix.unstack(slots, self.dtype)) if prefix else None
                if gradient == "inputs":
                    cache = Cache(layers=[CaptureLayer() for _ in range(self.layers)])
                hidden = backbone(
                    **inputs,
                    attention_mask=mask,
                    position_ids=torch.zeros(lines, width, dtype=torch.int64, device="meta"),
                    past_key_values=cache,
                    use_cache=gradient == "inputs",
                ).last_hidden_state
                if gradient == "inputs":
                    return torch.stack([t for layer in cache.layers for t in (layer.keys, layer.values)])
                return hidden
            except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
                raise InputError(
                    f"the work of this base cannot be counted: {type(error).__name__}: {' '.join(str(error).split())}",
                    where="model.base",
                ) from error

    @property
    def _mask_dtype(self) -> torch.dtype:
        return self.dtype if self.model.config._attn_implementation == "eager" else torch.bool

    @contextmanager
    def _fused(self, shape: Shape) -> Iterator[None]:
        """The model with an attention that keeps what a fused kernel keeps; the eager one where that is computed."""
        if self.capped and self.copies:
            yield
            return
        with computed_by(self.model, _fused_attention(self.copies and shape.pairs is None)):
            yield


class _Kept(torch.autograd.Function):
    """The memory of a fused attention: queries, keys, values, output and log-sum-exp are kept, logits never exist."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:3], dtype=torch.float32))
        return output


def _fused_attention(copies: bool) -> Callable[..., tuple[Tensor, None]]:
    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        group = query.shape[1] // key.shape[1]
        if copies and group > 1:
            key, value = (t.repeat_interleave(group, 1, output_size=query.shape[1]) for t in (key, value))
        output = _Kept.apply(query, key, value)
        return output.transpose(1, 2).contiguous(), None

    return attention
