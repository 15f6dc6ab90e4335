"""The row-wise part of the torch backend: from logits to per-token divergence and its gradient, in cache-sized blocks.

One formula serves every form. It takes reference logits z_t and the *difference* u = z_s − z_t, both [R, V], and works
on the log-ratio d = log q − log p = v − c with v = u − Σ p u and c = log Σ p e^v = log1p(Σ p expm1(v)), so that errors
of the logits enter the value to second order and nothing cancels as q → p:

    forward KL(p‖q)   value c − Σ p v                            dL/dz_s = p · expm1(d)
    reverse KL(q‖p)   value L = Σ q d                            dL/dz_s = q · (d − L)
    JSD_β             value (1−β) Σ q a − β Σ p s                dL/dz_s = (1−β) q · (a − Σ q a)
                      s = log m − log p = log1p((1−β) expm1(d)),  a = log q − log m = d − s

``shift`` = Σ p u + c = log Σ p e^u is what the log-partition moves by: log Z_s = log Z_t + shift.
Values are never clamped: a negative KL is an error meter.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

LARGE_LOG_RATIO = 30.0
"""Beyond this log-ratio, p · e^v loses range, and rows use exp(log p + v) instead."""


class RowWork(NamedTuple):
    """Of a block of rows: divergence [R], gradient dL/dz_s [R, V] (None unless wanted), shift log Z_s − log Z_t [R]."""

    value: Tensor
    gradient: Tensor | None
    shift: Tensor


def divergence_rows(z_t: Tensor, u: Tensor, divergence: str, beta: float, want_gradient: bool) -> RowWork:
    """The row-wise work of a block; both inputs may be overwritten.

    z_t, u: [R, V] float32 or float64. On a CPU the frequent case takes a path with few passes over memory.
    """
    if not u.is_cuda and divergence == "forward":
        p = torch.softmax(z_t, -1)
        mean = (p * u).sum(-1, keepdim=True)
        v = u.sub_(mean)
        if v.numel() == 0 or v.max() < LARGE_LOG_RATIO:
            return _forward_rows_small(p, v, mean[:, 0], z_t, want_gradient)
        work = divergence_rows_any_size(z_t, v, divergence, beta, want_gradient)
        return work._replace(shift=work.shift + mean[:, 0])
    return divergence_rows_any_size(z_t, u, divergence, beta, want_gradient)


def _forward_rows_small(p: Tensor, v: Tensor, mean: Tensor, scratch: Tensor, want_gradient: bool) -> RowWork:
    """Forward KL where every v < LARGE_LOG_RATIO, in place; expm1(v − c) = e^−c expm1(v) + expm1(−c)."""
    residual = torch.mul(p, v, out=scratch).sum(-1)
    moved = torch.mul(p, v.expm1_(), out=scratch)
    c = torch.log1p(moved.sum(-1))
    value, shift = c - residual, mean + c
    if not want_gradient:
        return RowWork(value, None, shift)
    gradient = moved.mul_(torch.exp(-c)[:, None]).addcmul_(p, torch.expm1(-c)[:, None])
    return RowWork(value, gradient, shift)


def divergence_rows_any_size(z_t: Tensor, u: Tensor, divergence: str, beta: float, want_gradient: bool) -> RowWork:
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
    if divergence == "forward":
        value = (c - (p * v).sum(-1, keepdim=True))[:, 0]
        return RowWork(value, torch.where(d < 0.5, near, q - p) if want_gradient else None, shift)
    if divergence == "reverse":
        mean = (q * d).sum(-1, keepdim=True)
        return RowWork(mean[:, 0], q * (d - mean) if want_gradient else None, shift)
    s = torch.where(
        d < LARGE_LOG_RATIO,
        torch.log1p((1 - beta) * torch.expm1(d.clamp(max=LARGE_LOG_RATIO))),
        d + math.log1p(-beta),
    )
    a = d - s
    mean = (q * a).sum(-1, keepdim=True)
    value = (1 - beta) * mean - beta * (p * s).sum(-1, keepdim=True)
    return RowWork(value[:, 0], (1 - beta) * q * (a - mean) if want_gradient else None, shift)


def normalize_(z: Tensor) -> tuple[Tensor, Tensor]:
    """Replaces logits [R, V] by their probabilities, in place; returns log Σ e^z [R] and the entropy in nats [R]."""
    top = z.amax(-1, keepdim=True)
    e = z.sub_(top).exp()
    mass = e.sum(-1)
    log_mass = mass.log()
    entropy = log_mass - z.mul_(e).sum(-1) / mass
    torch.div(e, mass[:, None], out=z)
    return log_mass + top[:, 0], entropy


RowFunction = Callable[[Tensor, Tensor, str, float, bool], RowWork]

_compiled: dict[str, Any] = {}


def row_function(rows: str) -> RowFunction:
    """The row-wise function for ``KLOptions.rows``; "compiled" falls back to eager for good when compiling fails.

    "auto" is eager; a plan has replaced it by what the table says.
    """
    return _compiled_rows if rows == "compiled" and "failed" not in _compiled else divergence_rows


def rows_in_use(rows: str) -> str:
    """ "compiled" or "eager": what ``row_function(rows)`` runs."""
    return "compiled" if row_function(rows) is not divergence_rows else "eager"


def _compiled_rows(z_t: Tensor, u: Tensor, divergence: str, beta: float, want_gradient: bool) -> RowWork:
    if "failed" not in _compiled:
        try:
            function = _compiled.setdefault("rows", torch.compile(divergence_rows_any_size, dynamic=True))
            return RowWork(*function(z_t, u, divergence, beta, want_gradient))
        except Exception as error:  # any failure of the compiler, which may be absent, must not stop the run
            _compiled["failed"] = error
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            warnings.warn(f'rows="compiled" is not available here, using rows="eager": {reason}', stacklevel=2)
    return divergence_rows(z_t, u, divergence, beta, want_gradient)
