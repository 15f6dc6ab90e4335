"""Each loss against its formula in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvopt.config.losses import Loss
from kvopt.config.students import StudentConfig
from kvopt.errors import KvoptError
from kvopt.kernels import Head
from kvopt.train.gold_tokens import Gold

G, D, V = 9, 12, 50


def case(trained_head: bool, softcap: float | None = None) -> Gold:
    rng = torch.Generator().manual_seed(4)
    hidden, anchor = (torch.randn(G, D, generator=rng) for _ in range(2))
    weight = torch.randn(V, D, generator=rng)
    own = weight + 0.1 * torch.randn(V, D, generator=rng) if trained_head else weight
    head = Head(own.requires_grad_(trained_head), softcap=softcap, scale=1.3)
    ids = torch.randint(V, (G,), generator=rng)
    return Gold(hidden.requires_grad_(), ids, head, anchor, Head(weight, softcap=softcap, scale=1.3))


def log_probs64(hidden: Tensor, head: Head, weight: Tensor) -> Tensor:
    logits = hidden @ weight.T * head.scale
    logits = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
    return logits.log_softmax(-1)


def formula(loss: dict[str, object], hidden: Tensor, weight: Tensor, gold: Gold) -> Tensor:
    """[G] float64, differentiable in hidden and weight."""
    log_q = log_probs64(hidden, gold.head, weight)
    log_p = log_probs64(gold.anchor.double(), gold.head, gold.anchor_head.weight.double())
    taken = log_q.gather(-1, gold.ids[:, None])[:, 0]
    first = -taken if loss["kind"] in ("ce", "anchored-kl") else -taken.detach().exp() * taken
    if loss["kind"] in ("ce", "dft"):
        return first
    forward = loss.get("direction", "forward") == "forward"
    kl = (log_p.exp() * (log_p - log_q)).sum(-1) if forward else (log_q.exp() * (log_q - log_p)).sum(-1)
    return first + loss["weight"] * kl


LOSSES = [
    {"kind": "ce"},
    {"kind": "dft"},
    {"kind": "anchored-kl", "weight": 0.7},
    {"kind": "anchored-kl", "weight": 0.7, "direction": "reverse", "anchor": "same"},
    {"kind": "asft", "weight": 0.3, "direction": "forward"},
    {"kind": "asft", "weight": 0.3, "direction": "reverse"},
]


def build(loss: dict[str, object]) -> Loss:
    return StudentConfig.model_validate({"name": "s", "contexts": ["original"], "loss": loss}).loss


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: "-".join(map(str, loss.values())))
def test_value_and_gradients_are_those_of_the_formula(
    loss: dict[str, object], trained_head: bool, softcap: float | None
) -> None:
    gold = case(trained_head, softcap)
    value = build(loss)(gold)
    hidden = gold.hidden.detach().double().requires_grad_()
    weight = gold.head.weight.detach().double().requires_grad_()
    wanted = formula(loss, hidden, weight, gold)
    torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-5)
    upstream = torch.linspace(0.5, 1.5, G)
    value.backward(upstream)
    wanted.backward(upstream.double())
    torch.testing.assert_close(gold.hidden.grad.double(), hidden.grad, rtol=1e-4, atol=1e-5)
    if trained_head:
        torch.testing.assert_close(gold.head.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["anchored-kl", "asft"])
def test_a_student_that_still_is_the_base_has_a_kl_of_zero(kind: str) -> None:
    gold = case(False)
    same = Gold(gold.hidden, gold.ids, gold.head, gold.hidden.detach(), gold.anchor_head)
    with_kl = build({"kind": kind, "weight": 10})(same)
    without = build({"kind": "ce" if kind == "anchored-kl" else "dft"})(same)
    torch.testing.assert_close(with_kl, without, rtol=0, atol=1e-5)


def test_log_probs_in_chunks_are_those_in_one_piece() -> None:
    def run(chunk_bytes: int) -> tuple[Tensor, Tensor]:
        gold = replace(case(True), chunk_bytes=chunk_bytes)
        value = gold.log_probs()
        value.sum().backward()
        return value.detach(), gold.hidden.grad

    for ours, theirs in zip(run(4 * V * 2), run(2**30), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_chunks_bound_the_logits_that_are_kept_for_the_backward_pass() -> None:
    def kept(chunk_bytes: int) -> int:
        sizes = [0]

        def pack(tensor: Tensor) -> Tensor:
            is_logits = tensor.shape[-1:] == (V,) and len(tensor) <= G  # the head is [D, V] with D > G
            sizes.append(tensor.numel() if is_logits else 0)
            return tensor

        gold = replace(case(False), chunk_bytes=chunk_bytes)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            gold.log_probs()
        return max(sizes)

    assert kept(2**30) == G * V
    assert kept(4 * V * 2) < G * V


def test_an_anchored_loss_without_an_anchor_is_an_error() -> None:
    gold = case(False)
    with pytest.raises(KvoptError, match="base's hidden states"):
        build({"kind": "asft"})(Gold(gold.hidden, gold.ids, gold.head))


def test_each_loss_says_what_the_base_sees() -> None:
    assert [build({"kind": kind}).anchor for kind in ("ce", "dft", "anchored-kl", "asft")] == [
        "none", "none", "original", "same",
    ]  # fmt: skip


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_logits_of_both_that_live_at_once_fit_the_bound(rows: int) -> None:
    seen: list[int] = []

    def formula(logits: Tensor, anchor_logits: Tensor, ids: Tensor) -> Tensor:
        seen.append(logits.nbytes + anchor_logits.nbytes)
        return logits.sum(-1)

    bound = 2 * 4 * V * rows
    replace(case(False), chunk_bytes=bound).over_both_logits(formula)
    assert max(seen) == bound
    assert len(seen) == -(-G // rows)
