"""The row-wise part of the torch backend: from logits to per-token divergence and its gradient, in cache-sized blocks.

One way serves every form. It takes reference logits z_t and the *difference* u = z_s − z_t, both [R, V], and works on
the log-ratio d = log q − log p = v − c with v = u − Σ p u and c = log Σ p e^v = log1p(Σ p expm1(v)), so that errors of
the logits enter the value to second order and nothing cancels as q → p. Value and dL/dz_s by p, q and d are the
divergence's own (divergences/).

``shift`` = Σ p u + c = log Σ p e^u is what the log-partition moves by: log Z_s = log Z_t + shift.
Values are never clamped: a negative KL is an error meter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvopt.kernels.divergences import Divergence, Ratios
from kvopt.kernels.divergences.registry import LARGE_LOG_RATIO


class RowWork(NamedTuple):
    """Of a block of rows: divergence [R], gradient dL/dz_s [R, V] (None unless wanted), shift log Z_s − log Z_t [R].

    dL/dz_s is gradient · scale[:, None] where there is a scale [R]: a factor of whole rows need not be a pass over
    them, because what the gradient is multiplied by next is linear.
    """

    value: Tensor
    gradient: Tensor | None
    shift: Tensor
    scale: Tensor | None = None


def divergence_rows(
    z_t: Tensor,
    u: Tensor,
    divergence: Divergence,
    want_gradient: bool,
    center: Tensor | None = None,
    scratch: Tensor | None = None,
) -> RowWork:
    """The row-wise work of a block; all inputs may be overwritten.

    On a CPU the frequent case takes a path with few passes over memory, and all of them in place: a fresh block costs
    more in page faults than a pass over it.

    Args:
        z_t, u: [R, V] float32 or float64.
        center: [R, 1], about Σ p u where that is known cheaply; any number is right, and a close one rounds less.
        scratch: [2, R, V] as z_t, room for what is computed in between.
    """
    if u.is_cuda or not divergence.in_place:
        return divergence_rows_any_size(z_t, u, divergence, want_gradient)
    p, products = (torch.empty_like(z_t), torch.empty_like(z_t)) if scratch is None else scratch
    torch.softmax(z_t, -1, out=p)
    if center is None:
        center = torch.mul(p, u, out=products).sum(-1, keepdim=True)
    v = u.sub_(center)
    if v.numel() == 0 or v.max() < LARGE_LOG_RATIO:
        work = RowWork(*divergence.rows_in_place(p, v, z_t, want_gradient))
    else:
        work = divergence_rows_any_size(z_t, v, divergence, want_gradient)
    return work._replace(shift=work.shift + center[:, 0])


def divergence_rows_any_size(z_t: Tensor, u: Tensor, divergence: Divergence, want_gradient: bool) -> RowWork:
    """As ``divergence_rows``, out of place, for log-ratios of any size and without a look at the data from the host."""
    log_p = torch.log_softmax(z_t, -1)
    p = log_p.exp()
    u_mean = (p * u).sum(-1, keepdim=True)
    v = u - u_mean
    c_near = torch.log1p((p * torch.expm1(v.clamp(max=1.0))).sum(-1, keepdim=True))
    c = torch.where(v.amax(-1, keepdim=True) > 1.0, torch.logsumexp(log_p + v, -1, keepdim=True), c_near)
    d, shift = v - c, (u_mean + c)[:, 0]
    near = p * torch.expm1(d.clamp(max=0.5))
    q = torch.where(d < 0.5, p + near, (log_p + d).exp())
    value, gradient = divergence.rows(Ratios(p, q, d, v, c, near), want_gradient)
    return RowWork(value, gradient, shift)


def normalize_(z: Tensor) -> tuple[Tensor, Tensor]:
    """Replaces logits [R, V] by their probabilities, in place; returns log Σ e^z [R] and the entropy in nats [R]."""
    top = z.amax(-1, keepdim=True)
    e = z.sub_(top).exp()
    mass = e.sum(-1)
    log_mass = mass.log()
    entropy = log_mass - z.mul_(e).sum(-1) / mass
    torch.div(e, mass[:, None], out=z)
    return log_mass + top[:, 0], entropy


RowFunction = Callable[[Tensor, Tensor, Divergence, bool, Tensor | None, Tensor | None], RowWork]

_compiled: dict[str, Any] = {}


def row_function(rows: str) -> RowFunction:
    """The row-wise function for ``KLOptions.rows``; "compiled" falls back to eager for good when compiling fails.

    "auto" is eager; a plan has replaced it by what the table says.
    """
    return _compiled_rows if rows == "compiled" and "failed" not in _compiled else divergence_rows


def _compiled_rows(
    z_t: Tensor,
    u: Tensor,
    divergence: Divergence,
    want_gradient: bool,
    center: Tensor | None = None,
    scratch: Tensor | None = None,
) -> RowWork:
    if "failed" not in _compiled:
        try:
            function = _compiled.setdefault("rows", torch.compile(divergence_rows_any_size, dynamic=True))
            return RowWork(*function(z_t, u, divergence, want_gradient))
        except Exception as error:  # any failure of the compiler, which may be absent, must not stop the run
            _compiled["failed"] = error
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            warnings.warn(f'rows="compiled" is not available here, using rows="eager": {reason}', stacklevel=2)
    return divergence_rows(z_t, u, divergence, want_gradient, center, scratch)
