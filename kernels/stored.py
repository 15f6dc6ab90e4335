"""References that are kept without the reference's head: moments (D + 2 numbers a token), or the top-k of an API.

For a frozen head, and divergences that have a formula for it (``Divergence.stored_forms``): forward KL. Hidden states
are the exact store and the default; see the README for when these pay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvopt.kernels.divergences import divergences
from kvopt.kernels.options import Head, KernelInputError, KLOptions, UnsupportedError
from kvopt.kernels.plan import rows_per_chunk
from kvopt.kernels.products import gradient_product, logits_product
from kvopt.kernels.rows import normalize_
from kvopt.kernels.torch_backend import block_rows, final_logits


@dataclass(frozen=True)
class Moments:
    """Everything forward KL needs of p: μ = Σ_v p_v W_v [N, D] float32, Σ_v p_v b_v [N], H(p) [N] in nats.

    W and b are the *candidate's* head; scale and temperature are not part of μ, but H(p) belongs to the temperature.
    The gradient keeps the precision contract down to KL 1e-6; the value is a difference of numbers of the size of the
    logits and is off by about 1e-5 nats, so it keeps it from about 1e-3 nats on.
    """

    mean_weight: Tensor
    mean_bias: Tensor
    entropy: Tensor
    temperature: float = 1.0

    def __len__(self) -> int:
        return len(self.entropy)

    def __getitem__(self, rows: Tensor | slice) -> Moments:
        return Moments(self.mean_weight[rows], self.mean_bias[rows], self.entropy[rows], self.temperature)


@dataclass(frozen=True)
class TopK:
    """The k most likely tokens of p: ids [N, k] int64, log_probs [N, k]; what is missing from 1 is the tail's mass.

    The divergence is that of the k + 1 outcomes (k tokens, and "another"): a lower bound of the true KL, 0 also where
    only the tails differ.
    """

    ids: Tensor
    log_probs: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Tensor | slice) -> TopK:
        return TopK(self.ids[rows], self.log_probs[rows])


StoredReference = Moments | TopK


@torch.no_grad()
def moments_of(
    reference_hidden: Tensor, head: Head, reference_head: Head | None = None, options: KLOptions | None = None
) -> Moments:
    """Moments of reference_hidden [N, D_t] under the candidate's ``head``; costs two head products in float32."""
    options = options or KLOptions()
    teacher, count = reference_head or head, len(reference_hidden)
    if head.softcap is not None:
        raise UnsupportedError("moments do not work with a softcap; store the reference hidden states instead")
    device = reference_hidden.device
    mean_weight = torch.empty(count, head.weight.shape[1], device=device)
    mean_bias, entropy = torch.zeros(count, device=device), torch.empty(count, device=device)
    step = rows_per_chunk(device, head.size, torch.float32, torch.float32, options)
    room = torch.empty(min(step, count), teacher.size, device=device)
    for start in range(0, count, step):
        part = slice(start, start + step)
        logits = logits_product(reference_hidden[part], teacher.rows, room[: len(reference_hidden[part])])
        for rows in _row_blocks(logits):
            z, _ = final_logits(logits[rows], teacher, options.temperature)
            _, entropy[part][rows] = normalize_(z)
            logits[rows] = z
        mean_weight[part] = gradient_product(logits, head.rows)
        if head.offsets is not None:
            mean_bias[part] = logits @ head.offsets.float()
    return Moments(mean_weight, mean_bias, entropy, options.temperature)


def check_stored(stored: StoredReference, candidate: Tensor, head: Head, options: KLOptions) -> str:
    """The form that serves a stored reference; raises where none does."""
    name, form = type(stored).__name__, "top-k" if isinstance(stored, TopK) else "moments"
    if form not in options.formula.stored_forms:
        titles = ", ".join(known.title for known in divergences().values() if form in known.stored_forms)
        raise UnsupportedError(
            f'{name} gives {titles} only, not divergence="{options.divergence}"; store the reference hidden states'
        )
    if head.trained:
        raise UnsupportedError(f"{name} has no gradient of the head; store the reference hidden states, or freeze it")
    if len(stored) != len(candidate):
        raise KernelInputError(f"candidate_hidden has {len(candidate)} tokens and the stored reference {len(stored)}")
    if options.backend not in ("auto", "torch"):
        raise UnsupportedError(f'{name} is computed by backend="torch" only; use that or backend="auto"')
    if isinstance(stored, TopK):
        if options.form != "auto":
            raise UnsupportedError(f'form="{options.form}" does not exist for top-k references; use form="auto"')
        return form
    if options.form not in ("auto", "moments"):
        raise UnsupportedError(f'form="{options.form}" needs reference hidden states; use form="moments"')
    if head.softcap is not None:
        raise UnsupportedError("moments do not work with a softcap; store the reference hidden states instead")
    if stored.mean_weight.shape[1] != head.weight.shape[1]:
        raise KernelInputError("the moments were made for a head of another hidden size; make them with moments_of")
    if stored.temperature != options.temperature:
        raise KernelInputError(
            f"the moments belong to temperature {stored.temperature}, options.temperature is {options.temperature}"
        )
    return form


def stored_value_and_gradient(
    stored: StoredReference, candidate: Tensor, head: Head, options: KLOptions, want_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The divergence [N] and its gradient by candidate [N, D], float32; all products in float32."""
    device, count = candidate.device, len(candidate)
    value = torch.empty(count, device=device)
    gradient = torch.empty(candidate.shape, device=device) if want_gradient else None
    step = rows_per_chunk(device, head.size, torch.float32, torch.float32, options)
    room = torch.empty(min(step, count), head.size, device=device)
    divergence, factor = options.formula, head.scale / options.temperature
    for start in range(0, count, step):
        part = slice(start, start + step)
        hidden, reference = candidate[part], stored[part]
        logits = logits_product(hidden, head.rows, room[: len(hidden)])
        for rows in _row_blocks(logits):
            z, slope = final_logits(logits[rows], head, options.temperature)
            if isinstance(reference, TopK):
                log_q, likeliest = torch.log_softmax(z, -1), reference[rows]
                value[part][rows], by_logits = divergence.of_top_k(log_q, likeliest.ids, likeliest.log_probs.float())
                logits[rows] = by_logits if slope is None else by_logits * slope
            else:
                value[part][rows], _ = normalize_(z)
        mean = None
        if isinstance(reference, Moments):
            mean = reference.mean_weight
            mean_logit = factor * ((hidden.float() * mean).sum(-1) + reference.mean_bias)
            value[part] = divergence.of_moments(value[part], mean_logit, reference.entropy)
        if gradient is not None:
            product = gradient_product(logits, head.rows)
            gradient[part] = (product if mean is None else product - mean) * factor
    return value, gradient


def _row_blocks(logits: Tensor) -> Iterator[slice]:
    """Slices of rows of a chunk of logits, whose row-wise temporaries stay small."""
    size = block_rows(logits.device, *logits.shape)
    return (slice(start, start + size) for start in range(0, len(logits), size))
