"""What the divergence op is asked to do: the head, the options, and the errors for what it cannot do.

Symbols used throughout the package: N tokens, D hidden size, V vocabulary, h_t / h_s the last hidden states (after the
final norm) of reference and candidate, z = softcap(scale * (h Wᵀ + b)) / T the logits, p = softmax(z_t) and
q = softmax(z_s).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kvopt.kernels.divergences import Divergence, divergences
from kvopt.kernels.products import Product

FORMS = ("auto", "direct", "difference", "moments")
BACKENDS = ("auto", "reference", "torch", "triton", "triton-rows", "triton-store-free")
ROWS = ("auto", "eager", "compiled")
PRODUCTS = ("auto", "float32")
REDUCTIONS = ("mean", "sum")


class KernelInputError(ValueError):
    """Wrong shapes, dtypes or values were given to the op; the message says which and how to fix it."""


class UnsupportedError(KernelInputError):
    """The combination asked for does not exist; the message names one that does."""


ROUNDING = 2**-6
"""More than a 16-bit sum can be off, as a share of the largest one (bfloat16 rounds by at most 2⁻⁹)."""


@dataclass(frozen=True)
class Head:
    """An output head: logits = softcap * tanh(scale * (h Wᵀ + b) / softcap), or scale * (h Wᵀ + b) without softcap.

    Args:
        weight: [V', D], float32, bfloat16, float16 or float64. Its gradient is computed only if it requires one.
        bias: [V'] or None; no gradient is computed unless it requires one.
        scale: factor on the logits (Granite, Cohere: ``logit_scale``); not zero.
        softcap: Gemma-2 style cap on the logits, or None.
        vocab: number of real rows; rows from ``vocab`` on are padding and take no part (logit −inf). Default: all.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    vocab: int | None = None

    def __post_init__(self) -> None:
        if self.weight.dim() != 2:
            raise KernelInputError(f"head.weight has shape {tuple(self.weight.shape)}; it must be [V, D]")
        if not self.weight.is_floating_point():
            raise KernelInputError(f"head.weight is {self.weight.dtype}; dequantise it to bfloat16 or float32 first")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise KernelInputError(f"head.bias has shape {tuple(self.bias.shape)}; it must be [{self.weight.shape[0]}]")
        if self.softcap is not None and not self.softcap > 0:
            raise KernelInputError(f"head.softcap is {self.softcap}; it must be positive, or None for no cap")
        if self.scale == 0:
            raise KernelInputError("head.scale is 0: every distribution would be uniform; give the model's logit scale")
        if self.vocab is not None and not 0 < self.vocab <= self.weight.shape[0]:
            raise KernelInputError(f"head.vocab is {self.vocab}; it must be between 1 and {self.weight.shape[0]}")

    @property
    def size(self) -> int:
        """V: the number of real vocabulary rows."""
        return self.vocab if self.vocab is not None else self.weight.shape[0]

    @property
    def rows(self) -> Tensor:
        """[V, D]: the real rows of ``weight`` (a view)."""
        return self.weight[: self.size]

    @property
    def offsets(self) -> Tensor | None:
        """[V]: the real entries of ``bias`` (a view), or None."""
        return None if self.bias is None else self.bias[: self.size]

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, V] float32 logits of hidden states [N, D], differentiable: for a few rows, such as the next token of an
        answer.

        Products of 16-bit states and heads keep their float32 sums, so that no near tie falls by rounding; under
        autocast, states and head are rounded to its dtype, the sums are not.
        """
        dtype, device = self.weight.dtype, hidden.device.type
        if dtype != torch.float64 and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        x = Product.apply(hidden.to(dtype), self.rows.to(dtype))
        x = (x if self.offsets is None else x + self.offsets.to(x.dtype)) * self.scale
        return self._capped(x)

    def _capped(self, x: Tensor) -> Tensor:
        return x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)

    @torch.no_grad()
    def most_likely(self, hidden: Tensor) -> Tensor:
        """[N] ids of the largest of :meth:`logits`, of equal ones the first.

        On a CPU, a 16-bit product finds those that are near the largest, and only their sums are computed again.
        """
        if self.weight.dtype not in (torch.bfloat16, torch.float16) or hidden.device.type != "cpu":
            return self.logits(hidden).argmax(-1)
        product = nn.functional.linear(hidden.to(self.weight.dtype), self.rows, self.offsets)
        rough = self._capped(product.float() * self.scale)
        near = rough >= rough.amax(-1, keepdim=True) - ROUNDING * rough.abs().amax(-1, keepdim=True)
        ids = near.any(0).nonzero()[:, 0]
        few = replace(self, weight=self.rows[ids], bias=None if self.offsets is None else self.offsets[ids], vocab=None)
        return ids[few.logits(hidden).masked_fill(~near[:, ids], -torch.inf).argmax(-1)]

    @property
    def trained(self) -> bool:
        """Whether a gradient of weight or bias is wanted."""
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)

    def same_as(self, other: Head) -> bool:
        """Whether both give the same logits for the same hidden states because they are the same tensors."""
        if self is other:
            return True
        bias_same = (self.bias is None) == (other.bias is None) and (
            self.bias is None or other.bias is None or _same_memory(self.bias, other.bias)
        )
        return (
            _same_memory(self.weight, other.weight)
            and bias_same
            and (self.scale, self.softcap, self.size) == (other.scale, other.softcap, other.size)
        )


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a is b or (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
        and a.device == b.device
    )


@dataclass(frozen=True)
class KLOptions:
    """How a divergence is computed. Every field has a documented range; what is out of it raises by name.

    Args:
        divergence: "forward" KL(p‖q), "reverse" KL(q‖p), "jsd": β KL(p‖m) + (1−β) KL(q‖m), m = β p + (1−β) q, or any
            other file of divergences/, which states its formula.
        beta: β of "jsd", strictly between 0 and 1. At the ends the formula is 0 everywhere (libraries that accept
            β = 0 or 1 mean the two KLs): use divergence="forward" or "reverse" for those.
        form: "direct" (both logits in float32), "difference" (shared head; exact near KL 0), "moments" (forward KL,
            frozen head, stored or computed mean of W under p), or "auto"; the result says which was used.
        backend: "reference" (float64, slow), "torch" (any device), "triton" (CUDA, ROCm; one of its two kernels alone:
            "triton-rows", "triton-store-free"), or "auto": what the table of measured times says (table.py).
        temperature: T > 0. No T² factor is folded in.
        chunk_bytes: budget for the logit-sized buffers of one chunk, ≥ 1 MiB; None picks 96 MiB on a CPU (48 MiB
            for 16-bit logits), and on a GPU 512 MiB with never fewer than 1,024 rows.
        rows: row-wise work of the torch backend: "eager" (on a CPU blocked and in place), "compiled" (torch.compile;
            falls back to eager for good, with a warning, where compiling fails), "auto" (as the table says).
        products: "float32" computes every product in float32. "auto" uses 16-bit products where they keep the
            precision contract and are faster: the difference form, 16-bit inputs, on hardware that has them.
        reduction: how ``result.loss`` reduces: "mean" (Σ w·kl / Σ w over unmasked tokens) or "sum".
    """

    divergence: str = "forward"
    beta: float = 0.5
    form: str = "auto"
    backend: str = "auto"
    temperature: float = 1.0
    chunk_bytes: int | None = None
    rows: str = "auto"
    products: str = "auto"
    reduction: str = "mean"

    def __post_init__(self) -> None:
        choices = {"divergence": tuple(divergences()), **_CHOICES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise KernelInputError(f"options.{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        if not self.temperature > 0:
            raise KernelInputError(f"options.temperature is {self.temperature}; it must be positive")
        try:
            _ = self.formula
        except ValueError as problem:
            raise KernelInputError(f"options.{problem}") from None
        if self.chunk_bytes is not None and self.chunk_bytes < 2**20:
            raise KernelInputError(f"options.chunk_bytes is {self.chunk_bytes}; it must be at least 1 MiB (1048576)")

    @property
    def formula(self) -> Divergence:
        """The divergence itself, with its ``beta``."""
        return divergences()[self.divergence](self.beta)


_CHOICES = {
    "form": FORMS,
    "backend": BACKENDS,
    "rows": ROWS,
    "products": PRODUCTS,
    "reduction": REDUCTIONS,
}
