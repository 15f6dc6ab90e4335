"""The implementations that the benchmark runs side by side, ours and others', behind one signature.

A contender maps (candidate hidden [N, D] that requires a gradient, reference hidden [N, D], head weight [V, D], frozen)
to the mean forward KL, differentiable. Others' code is imported only when its contender is built.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import kl_div, linear, log_softmax

from kvopt.kernels.linear_kl import linear_kl
from kvopt.kernels.options import Head, KLOptions
from kvopt.kernels.stored import Moments, moments_of
from kvopt.kernels.table import USES

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class NotHere(Exception):
    """A contender cannot run on this installation or device; the message says why."""


def build(name: str, device: torch.device) -> Loss:
    """The contender called ``name``; raises NotHere with the reason where it cannot run."""
    if name not in BUILDERS:
        raise NotHere(f"unknown; choose from {', '.join(BUILDERS)}")
    return BUILDERS[name](device)


def _ours(options: KLOptions) -> Callable[[torch.device], Loss]:
    def builder(device: torch.device) -> Loss:
        if options.backend.startswith("triton") and (device.type != "cuda" or find_spec("triton") is None):
            raise NotHere("needs a GPU and the triton package")

        copies: list[tuple[Tensor, Tensor]] = []

        def loss(h: Tensor, reference: Tensor, weight: Tensor) -> Tensor:
            if options.form != "direct":
                return linear_kl(h, reference, Head(weight), None, options).loss
            if not copies or copies[0][0] is not weight:  # the teacher's own head, copied once
                copies[:] = [(weight, weight.clone())]
            return linear_kl(h, reference, Head(weight), Head(copies[0][1]), options).loss

        return loss

    return builder


def _our_moments(device: torch.device) -> Loss:
    stored: list[tuple[Tensor, Moments]] = []

    def loss(h: Tensor, reference: Tensor, weight: Tensor) -> Tensor:
        if not stored or stored[0][0] is not reference:
            stored[:] = [(reference, moments_of(reference, Head(weight)))]
        return linear_kl(h, stored[0][1], Head(weight)).loss

    return loss


def _plain(h: Tensor, reference: Tensor, weight: Tensor) -> Tensor:
    log_p = log_softmax(linear(reference, weight).detach(), -1)
    return kl_div(log_softmax(linear(h, weight), -1), log_p, reduction="none", log_target=True).sum(-1).mean()


def _plain_float32(device: torch.device) -> Loss:
    return lambda h, reference, weight: _plain(h.float(), reference.float(), weight.float())


def _compiled_plain(device: torch.device) -> Loss:
    compiled = torch.compile(_plain)

    def loss(h: Tensor, reference: Tensor, weight: Tensor) -> Tensor:
        for hidden in (h, reference):
            torch._dynamo.mark_dynamic(hidden, 0)  # any number of tokens without compiling again
        return compiled(h, reference, weight)

    return loss


def _liger(device: torch.device) -> Loss:
    if find_spec("liger_kernel") is None:
        raise NotHere("liger-kernel is not installed")
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    fused = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False)

    def loss(h: Tensor, reference: Tensor, weight: Tensor) -> Tensor:
        labels = torch.zeros(len(h), dtype=torch.long, device=h.device)
        return fused(h, weight, reference, weight, labels)

    return loss


def _trl(device: torch.device) -> Loss:
    if find_spec("trl") is None:
        raise NotHere("trl is not installed")
    try:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    except Exception as error:
        raise NotHere(f"trl has no usable ChunkedDivergenceFunction: {error}") from error

    def loss(h: Tensor, reference: Tensor, weight: Tensor) -> Tensor:
        return ChunkedDivergenceFunction.apply(h, weight, None, reference, weight, None, 0.0)[0].mean()

    return loss


def _fla(device: torch.device) -> Loss:
    if device.type != "cuda" or find_spec("fla") is None:
        raise NotHere("needs a GPU and flash-linear-attention")
    from fla.modules.fused_kl_div import FusedKLDivLoss

    fused = FusedKLDivLoss()
    return lambda h, reference, weight: fused(h, reference, weight, weight)


BUILDERS: dict[str, Callable[[torch.device], Loss]] = {
    "kvopt": _ours(KLOptions()),
    "kvopt float32 products": _ours(KLOptions(products="float32")),
    "kvopt direct": _ours(KLOptions(form="direct")),
    "kvopt moments, stored": _our_moments,
    **{f"kvopt: {use}": _ours(options) for use, options in USES.items()},
    "torch float32": _plain_float32,
    "torch": lambda device: _plain,
    "torch compiled": _compiled_plain,
    "Liger chunked JSD": _liger,
    "TRL chunked divergence": _trl,
    "fla fused KL": _fla,
}
TABLE = [f"kvopt: {use}" for use in USES]
"""Contenders that the table chooses from."""

DEFAULT = [name for name in BUILDERS if name not in ("kvopt: torch", "kvopt: torch compiled rows")]
