"""Keys of a short prefix moved so that attention with them gives what attention with a long prefix gave.

Source: KVSculpt (arXiv 2603.27819): L-BFGS on the keys, values by least squares; here keys and values descend together,
and the values are fitted in closed form afterwards.

Symbols: T slots, H key/value heads, Q queries of a head, d head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

KEY_QUERIES = 2400
"""Queries of a key/value head that decide, at most; evenly taken from all."""


def attention_weights(query: Tensor, keys: Tensor, visible: Tensor, body_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of queries [H, Q, d] (scaled) on slots, [H, Q, T], and on their bodies, [H, Q, 1].

    Args:
        keys: [H, T, d].
        visible: [Q, T], where a query may look.
        body_lse: [H, Q], log sum exp of the logits over the body.
    """
    scores = (query @ keys.transpose(1, 2)).masked_fill(~visible, -torch.inf)
    body = body_lse[..., None]
    total = torch.logaddexp(scores.logsumexp(-1, keepdim=True), body)
    return (scores - total).exp(), (body - total).exp()


def moved_keys(
    keys: Tensor,
    values: Tensor,
    query: Tensor,
    visible: Tensor,
    body_lse: Tensor,
    body_read: Tensor,
    target: Tensor,
    steps: int,
) -> Tensor:
    """Keys [H, T, d] in fp32 after so many steps of L-BFGS on the squared error of what is read, relative to a head's
    mean square; slot 0 stays.

    Args:
        keys, values: [H, T, d], where keys and values begin.
        query, visible, body_lse: as in :func:`attention_weights`.
        body_read: [H, Q, d], softmax over the body alone, times its values.
        target: [H, Q, d], what should be read.
    """
    sees = visible.any(-1).nonzero()[:, 0]
    places = sees[torch.linspace(0, len(sees) - 1, min(KEY_QUERIES, len(sees))).round().long()]
    query, body_lse, body_read, target = (x[:, places] for x in (query, body_lse, body_read, target))
    visible, sink = visible[places], keys[:, :1].float()
    size = target.square().mean((1, 2)) + 1e-12
    moving = [
        x.float().clone(memory_format=torch.contiguous_format).requires_grad_(True) for x in (keys[:, 1:], values)
    ]
    descent = torch.optim.LBFGS(
        moving, max_iter=steps, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        with torch.enable_grad():
            weights, rest = attention_weights(query, torch.cat([sink, moving[0]], dim=1), visible, body_lse)
            error = (weights @ moving[1] + rest * body_read - target).square().mean(-1).sum(-1)
            loss = (error / size).sum()
        moving[0].grad, moving[1].grad = (g.contiguous() for g in torch.autograd.grad(loss, moving))
        return loss.detach()

    descent.step(closure)  # type: ignore[no-untyped-call]
    return torch.cat([sink, moving[0].detach()], dim=1)
