"""The divergence in float64, written as in a textbook: the yardstick for every other backend and form.

``backend="reference"`` computes this, and the tests and the benchmark measure errors against it. It is slow and holds
several N x V tensors; its gradients are autograd's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvopt.kernels.options import Head, KLOptions


def logits64(hidden: Tensor, head: Head, temperature: float) -> Tensor:
    """[N, V] float64 logits, differentiable."""
    z = hidden.double() @ head.rows.double().T
    if head.offsets is not None:
        z = z + head.offsets.double()
    z = z * head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z / temperature


def linear_kl64(
    candidate_hidden: Tensor, reference_hidden: Tensor, head: Head, reference_head: Head, options: KLOptions
) -> Tensor:
    """[N] float64 per-token divergence, differentiable by autograd in candidate_hidden and head; p is a constant."""
    with torch.no_grad():
        log_p = logits64(reference_hidden, reference_head, options.temperature).log_softmax(-1)
    log_q = logits64(candidate_hidden, head, options.temperature).log_softmax(-1)
    return options.formula.exact(log_p, log_q)
