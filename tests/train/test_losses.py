"""Each loss against its formula in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from kvopt.config.losses import Loss
from kvopt.config.students import StudentConfig
from kvopt.errors import KvoptError
from kvopt.kernels import Head
from kvopt.train.gold_tokens import Gold
from kvopt.train.losses.anchored_kl import masked_kl
from kvopt.train.losses.one_token_rollout import tokens_at, uniforms_for

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


def masked_kl64(log_p: Tensor, log_q: Tensor, ids: Tensor, forward: bool) -> Tensor:
    """KL over the tokens beside the gold one, of p / (1 − p(gold)) and q / (1 − q(gold))."""
    others = torch.ones_like(log_p, dtype=torch.bool).scatter(-1, ids[:, None], False)
    p, q = (log[others].view(len(ids), -1) - torch.log1p(-log.gather(-1, ids[:, None]).exp()) for log in (log_p, log_q))
    return (p.exp() * (p - q)).sum(-1) if forward else (q.exp() * (q - p)).sum(-1)


def formula(loss: dict[str, object], hidden: Tensor, weight: Tensor, gold: Gold) -> Tensor:
    """[G] float64, differentiable in hidden and weight."""
    log_q = log_probs64(hidden, gold.head, weight)
    log_p = log_probs64(gold.anchor.double(), gold.head, gold.anchor_head.weight.double())
    taken = log_q.gather(-1, gold.ids[:, None])[:, 0]
    if loss["kind"] == "one-token-rollout":
        return rollout64(log_q, gold, loss)
    first = -taken if loss["kind"] in ("ce", "anchored-kl", "consistency") else -taken.detach().exp() * taken
    if loss["kind"] in ("ce", "dft"):
        return first
    if loss.get("divergence", "") == "jsd":
        log_m = ((log_p.exp() + log_q.exp()) / 2).log()
        both = (log_p.exp() * (log_p - log_m)).sum(-1) + (log_q.exp() * (log_q - log_m)).sum(-1)
        return first + loss["weight"] * both / 2
    forward = loss.get("direction", loss.get("divergence", "forward")) == "forward"
    if loss.get("target") == "masked":
        return first + loss["weight"] * masked_kl64(log_p, log_q, gold.ids, forward)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1) if forward else (log_q.exp() * (log_q - log_p)).sum(-1)
    return first + loss["weight"] * kl


def rollout64(log_q: Tensor, gold: Gold, loss: dict[str, Any]) -> Tensor:
    """Token by token: drawn where the summed probabilities pass a uniform number, rewarded, averaged."""
    drawn_at = (log_q.detach() / loss["temperature"]).softmax(-1)
    values = []
    for row, uniforms in enumerate(uniforms_for(gold.hidden, loss["samples"])):
        summed = drawn_at[row].numpy().cumsum()
        drawn = [int(np.searchsorted(summed, float(u), side="right")) for u in uniforms]
        rewards = [1.0 if token == int(gold.ids[row]) else -loss["penalty"] for token in drawn]
        values.append(-sum(r * log_q[row, a] for r, a in zip(rewards, drawn, strict=True)) / len(drawn))
    return torch.stack(values)


LOSSES = [
    {"kind": "ce"},
    {"kind": "dft"},
    {"kind": "anchored-kl", "weight": 0.7},
    {"kind": "anchored-kl", "weight": 0.7, "direction": "reverse", "anchor": "same"},
    {"kind": "anchored-kl", "weight": 0.7, "target": "masked"},
    {"kind": "anchored-kl", "weight": 0.7, "target": "masked", "direction": "reverse", "anchor": "same"},
    {"kind": "one-token-rollout", "samples": 40, "temperature": 1.7, "penalty": 0.3},
    {"kind": "asft", "weight": 0.3, "direction": "forward"},
    {"kind": "asft", "weight": 0.3, "direction": "reverse"},
    {"kind": "consistency", "weight": 0.6, "divergence": "jsd"},
    {"kind": "consistency", "weight": 0.6, "divergence": "forward"},
    {"kind": "consistency", "weight": 0.6, "divergence": "reverse"},
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
def test_a_weight_below_zero_is_refused_and_zero_is_no_kl(kind: str) -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        build({"kind": kind, "weight": -0.01})
    plain = build({"kind": "ce" if kind == "anchored-kl" else "dft"})
    torch.testing.assert_close(build({"kind": kind, "weight": 0})(case(False)), plain(case(False)))


@pytest.mark.parametrize("kind", ["anchored-kl", "asft"])
def test_a_student_that_still_is_the_base_has_a_kl_of_zero(kind: str) -> None:
    gold = case(False)
    same = Gold(gold.hidden, gold.ids, gold.head, gold.hidden.detach(), gold.anchor_head)
    with_kl = build({"kind": kind, "weight": 10})(same)
    without = build({"kind": "ce" if kind == "anchored-kl" else "dft"})(same)
    torch.testing.assert_close(with_kl, without, rtol=0, atol=1e-5)


def test_a_head_that_is_trained_is_a_constant_where_it_is_the_anchor_s_too() -> None:
    gold = case(True)
    build({"kind": "consistency", "weight": 0.6})(replace(gold, anchor_head=gold.head)).sum().backward()
    hidden = gold.hidden.detach().double().requires_grad_()
    weight = gold.head.weight.detach().double().requires_grad_()
    constant = replace(gold, anchor_head=replace(gold.head, weight=weight.detach()))
    formula({"kind": "consistency", "weight": 0.6, "divergence": "jsd"}, hidden, weight, constant).sum().backward()
    torch.testing.assert_close(gold.head.weight.grad.double(), weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gold.hidden.grad.double(), hidden.grad, rtol=1e-4, atol=1e-5)


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
    assert [build({"kind": kind}).anchor for kind in ("ce", "dft", "anchored-kl", "asft", "consistency")] == [
        "none", "none", "original", "same", "other",
    ]  # fmt: skip


MASKED = {"kind": "anchored-kl", "weight": 1.0, "target": "masked"}


def certain(logit: float) -> Gold:
    """Gold tokens whose logit is raised by so much under student and base alike, by a feature of their own."""
    gold = case(False)
    pad = torch.full((G, 1), logit / 1.3)
    weight = torch.cat([gold.head.weight, torch.zeros(V, 1)], -1)
    weight[0, -1] = 1.0
    head = Head(weight, scale=1.3)
    hidden = torch.cat([gold.hidden.detach(), pad], -1).requires_grad_()
    return Gold(hidden, torch.zeros(G, dtype=torch.int64), head, torch.cat([gold.anchor, pad], -1), head)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("logit", [0.0, 20.0, 60.0, 3000.0])
def test_the_masked_kl_stays_exact_as_the_gold_token_becomes_certain(direction: str, logit: float) -> None:
    gold = certain(logit)
    loss = build(MASKED | {"direction": direction})
    value = loss(gold) - build({"kind": "ce"})(gold)
    (gradient,) = torch.autograd.grad(value.sum(), gold.hidden)
    hidden = gold.hidden.detach().double().requires_grad_()
    others = gold.head.weight[1:, :-1].double().T * 1.3  # the gold token is number 0: without its column
    p, q = ((h @ others).log_softmax(-1) for h in (gold.anchor.double()[:, :-1], hidden[:, :-1]))
    wanted = (p.exp() * (p - q)).sum(-1) if direction == "forward" else (q.exp() * (q - p)).sum(-1)
    wanted.sum().backward()
    torch.testing.assert_close(value.double(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient.double(), hidden.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_masked_kl_leaves_the_gold_logit_to_the_cross_entropy(direction: str) -> None:
    ids = torch.arange(3)
    base = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    student = base.clone()
    student[range(3), ids] += 5.0  # differs from the base in the gold token alone
    student.requires_grad_()
    identity = Head(torch.eye(8))
    for target, free in (("masked", True), ("all", False)):
        loss = build(MASKED | {"target": target, "direction": direction})
        both = Gold(student, ids, identity, base, identity)
        (gradient,) = torch.autograd.grad((loss(both) - build({"kind": "ce"})(both)).sum(), student)
        assert (float(gradient.abs().max()) < 1e-5) is free


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_the_masked_kl_of_16_bit_heads_is_that_of_the_same_numbers_in_float64(
    dtype: torch.dtype, rounding: float, direction: str
) -> None:
    rng = torch.Generator().manual_seed(8)
    weight = (0.5 * torch.randn(600, 64, generator=rng)).to(dtype)
    anchor = (2 * torch.randn(40, 64, generator=rng)).to(dtype)
    hidden = (anchor + 0.1 * torch.randn(40, 64, generator=rng)).to(dtype).requires_grad_()
    ids = torch.randint(600, (40,), generator=rng)
    gold = Gold(hidden, ids, Head(weight), anchor, Head(weight.clone()))
    value = gold.over_both_logits(lambda z, anchor_z, y: masked_kl(z, anchor_z, y, direction))
    exact = hidden.detach().double().requires_grad_()
    log_p, log_q = ((h @ weight.double().T).log_softmax(-1) for h in (anchor.double(), exact))
    wanted = masked_kl64(log_p, log_q, ids, direction == "forward")
    torch.testing.assert_close(value.double(), wanted, rtol=1e-3, atol=1e-5)
    (gradient,) = torch.autograd.grad(value.sum(), hidden)
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), exact)
    assert float((gradient.double() - wanted_gradient).norm() / wanted_gradient.norm()) < rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_masked_anchor_trains_a_16_bit_head(dtype: torch.dtype) -> None:
    gold = case(True)
    weight = gold.head.weight.detach().to(dtype).requires_grad_()
    hidden = gold.hidden.detach().to(dtype).requires_grad_()
    build(MASKED)(Gold(hidden, gold.ids, Head(weight, scale=1.3), gold.anchor, gold.anchor_head)).sum().backward()
    exact, its_weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    formula(MASKED, exact, its_weight, gold).sum().backward()
    for ours, theirs in ((hidden.grad, exact.grad), (weight.grad, its_weight.grad)):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("trained_head", [False, True])
def test_the_masked_anchor_in_chunks_is_that_in_one_piece(trained_head: bool) -> None:
    def run(chunk_bytes: int) -> tuple[Tensor, Tensor, int]:
        kept = [0]

        def pack(tensor: Tensor) -> Tensor:
            kept.append(tensor.numel() if tensor.shape[-1:] == (V,) and len(tensor) <= G else 0)
            return tensor

        gold = replace(case(trained_head), chunk_bytes=chunk_bytes)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            value = build(MASKED)(gold)
        value.sum().backward()
        return value.detach(), gold.hidden.grad, sum(kept)

    value, gradient, kept = run(2**30)
    in_chunks, its_gradient, kept_in_chunks = run(8 * V * 2)
    torch.testing.assert_close(in_chunks, value)
    torch.testing.assert_close(its_gradient, gradient)
    assert kept >= G * V
    assert kept_in_chunks == 0


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


def test_a_student_that_still_is_the_base_has_a_masked_kl_of_zero() -> None:
    gold = case(False, 5.0)
    same = Gold(gold.hidden, gold.ids, gold.head, gold.hidden.detach(), gold.anchor_head)
    torch.testing.assert_close(build(MASKED | {"weight": 10})(same), build({"kind": "ce"})(same), rtol=0, atol=1e-5)


def test_the_target_is_in_stored_settings_only_where_it_is_not_the_default() -> None:
    assert "target" not in build({"kind": "anchored-kl"}).model_dump(mode="json")
    assert "target" not in build(MASKED | {"target": "all"}).model_dump(mode="json")
    assert build(MASKED).model_dump(mode="json")["target"] == "masked"


def test_rollouts_draw_tokens_as_often_as_they_are_likely_and_the_same_ones_again() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]])
    drawn = tokens_at(logits, uniforms_for(torch.ones(1, 3), 20_000))
    shares = torch.bincount(drawn[0], minlength=4) / 20_000
    probabilities = logits.softmax(-1)[0]
    assert ((shares - probabilities).abs() < 5 * (probabilities * (1 - probabilities) / 20_000).sqrt()).all()
    assert torch.equal(uniforms_for(torch.ones(2, 3), 8), uniforms_for(torch.ones(2, 3), 8))
    assert not torch.equal(uniforms_for(torch.ones(2, 3), 8), uniforms_for(2 * torch.ones(2, 3), 8))
    last = tokens_at(logits, torch.tensor([[0.0, 1 - 2**-24]]))
    assert last.tolist() == [[0, 3]]
    never = tokens_at(torch.tensor([[-torch.inf, 0.0]]), torch.tensor([[0.0]]))
    assert never.tolist() == [[1]]  # a token without probability is not drawn


def test_rollouts_in_chunks_are_those_in_one_piece() -> None:
    def run(chunk_bytes: int) -> tuple[Tensor, Tensor]:
        gold = replace(case(True), chunk_bytes=chunk_bytes)
        value = build({"kind": "one-token-rollout", "samples": 16})(gold)
        value.sum().backward()
        return value.detach(), gold.hidden.grad

    for ours, theirs in zip(run(4 * V * 2), run(2**30), strict=True):
        torch.testing.assert_close(ours, theirs)
