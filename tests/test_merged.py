"""Rows in one line on a CPU, apart from their prefix: two attentions merged are one over both, and its gradients."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from kvopt.base import merged
from kvopt.base.generate import generate
from kvopt.base.loading import Base, enable_checkpointing, load_base
from kvopt.base.merged import NAME, merged_attention, merged_fault, with_merged
from kvopt.base.prefix import Prefix, gold_hidden, packing_for, prefill
from kvopt.config.model import ModelConfig
from tests.attentions import base_of
from tests.test_packing import padding_only, ragged_batch, states_and_gradient
from tests.tiny import tiny_base, tiny_folder

LENGTHS = [5, 1, 90, 17]
IDS = [20, 31, 42, 53, 64]
PLAIN = ("llama", "qwen3")


def states(count: int, heads: int, size: int = 8) -> Tensor:
    """[heads, count, size], laid out as a model's are."""
    return torch.randn(count, heads, size, dtype=torch.float64).transpose(0, 1)


def over_both(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One attention with a mask, over prefix and line."""
    owner = torch.repeat_interleave(torch.tensor(LENGTHS))
    own = (owner[:, None] == owner[None, :]).tril()
    mask = torch.cat([own.new_ones(len(own), keys.shape[1]), own], 1)
    joined = [
        torch.cat(pair, 1).repeat_interleave(len(query) // len(key), 0) for pair in ((keys, key), (values, value))
    ]
    return scaled_dot_product_attention(query, *joined, attn_mask=mask, scale=0.3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("slots", [1, 70])
def test_output_and_gradients_are_those_of_one_attention(
    dtype: torch.dtype, tolerance: float, groups: int, slots: int
) -> None:
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    exact = [states(tokens, 2 * groups), *(states(n, 2) for n in (tokens, tokens, slots, slots))]
    given = [t.to(dtype).requires_grad_() for t in exact]
    exact = [t.detach().double().requires_grad_() for t in given]
    ours, theirs = merged_attention(*given, LENGTHS, 0.3), over_both(*exact)  # type: ignore[call-arg]
    upstream = torch.randn_like(theirs).to(dtype)
    results = zip(
        (ours, *torch.autograd.grad(ours, given, upstream)),
        (theirs, *torch.autograd.grad(theirs, exact, upstream.double())),
        strict=True,
    )
    for our, their in results:
        assert our.dtype == dtype
        assert (our.double() - their).norm() <= tolerance * their.norm()


@pytest.mark.parametrize("name", PLAIN)
def test_packed_rows_have_the_states_and_gradients_of_padded_ones(name: str) -> None:
    base, batch = base_of(name), ragged_batch()
    packing = packing_for(base, batch, 11)
    assert packing is not None
    assert (packing.apart, packing.lines, packing.width) == (True, 1, sum(batch.lengths))
    prefix = prefill(base, ids=torch.arange(20, 31))
    for ours, theirs in zip(
        states_and_gradient(base, prefix, batch), states_and_gradient(padding_only(base), prefix, batch), strict=True
    ):
        assert theirs.norm() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_in_bfloat16_they_differ_by_rounding() -> None:
    exact, batch = base_of("qwen3"), ragged_batch()
    base = load_base(ModelConfig(base=str(tiny_folder("qwen3")), dtype="bfloat16", device="cpu"))
    assert base.model.config._attn_implementation == NAME
    prefix = prefill(exact, ids=torch.arange(20, 31))
    goal = states_and_gradient(padding_only(exact), prefix, batch)
    results = [states_and_gradient(which, prefix, batch) for which in (base, padding_only(base))]
    for ours, theirs, truth in zip(*results, goal, strict=True):
        errors = [float((t.float() - truth).norm() / truth.norm()) for t in (ours, theirs)]
        assert errors[0] < max(0.02, 1.5 * errors[1]), errors


@pytest.mark.parametrize("name", PLAIN)
def test_a_soft_prompt_gets_its_gradient_with_layers_computed_again(name: str) -> None:
    base, batch = copy.deepcopy(base_of(name)), ragged_batch()
    embeddings = base.embed(torch.arange(20, 31)).detach().requires_grad_()

    def gradient(which: Base) -> Tensor:
        hidden = gold_hidden(which, prefill(which, embeddings=embeddings), batch)
        return torch.autograd.grad((hidden * torch.arange(len(hidden))[:, None]).mean(), embeddings)[0]

    expected = gradient(padding_only(base))
    assert expected.norm() > 0
    torch.testing.assert_close(gradient(base), expected, rtol=1e-4, atol=1e-5)
    enable_checkpointing(base.model)
    torch.testing.assert_close(gradient(base), expected, rtol=1e-4, atol=1e-5)


def test_answers_are_those_after_padded_bodies() -> None:
    base = base_of("llama")
    prefix = prefill(base, ids=torch.arange(20, 31))
    bodies = [(5, 6, 7), (8,), (9, 10, 11, 12, 13, 14), (15, 16)]
    ours, theirs = (generate(which, prefix, bodies, max_new_tokens=8) for which in (base, padding_only(base)))
    assert ours == theirs


def test_linear_layers_compute_no_padding() -> None:
    base, batch = base_of("llama"), ragged_batch()
    prefix = prefill(base, ids=torch.arange(20, 31))
    layers = sum(m.weight.numel() for m in base.backbone.modules() if isinstance(m, torch.nn.Linear))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        gold_hidden(base, prefix, batch)
    linear = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if op.__name__ in ("mm", "addmm"))
    assert linear == 2 * layers * sum(batch.lengths)


def test_other_masks_give_what_the_model_gave_before() -> None:
    base, batch = base_of("llama"), ragged_batch()
    plain = replace(base, model=copy.deepcopy(base.model))
    plain.model.set_attn_implementation("sdpa")
    prefix: Prefix = prefill(base, ids=torch.arange(20, 31))
    ours, theirs = (gold_hidden(padding_only(which), prefix, batch) for which in (base, plain))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["gemma3", "gemma2", "gpt-oss"])
def test_windows_softcaps_and_sinks_are_packed_with_masks(name: str) -> None:
    base = base_of(name)
    assert base.model.config._attn_implementation != NAME
    packing = packing_for(base, ragged_batch(), 11)
    assert packing is not None
    assert not packing.apart


def taken(**settings: str) -> tuple[bool, str]:
    """Whether rows and prefix are apart under these settings, and the attention that the model has then."""
    base, dropout = tiny_base("llama"), float(settings.pop("dropout", 0))
    model = copy.deepcopy(base.model)
    model.set_attn_implementation("sdpa")
    model.config.attention_dropout = dropout
    used = with_merged(model, IDS, base.capability, ModelConfig(**settings))  # type: ignore[arg-type]
    return used, model.config._attn_implementation


def test_settings_turn_it_off() -> None:
    assert taken() == taken(attention="packed") == (True, NAME)
    assert taken(attention="padded") == taken(attn_implementation="sdpa") == taken(dropout="0.1") == (False, "sdpa")


def test_a_model_that_fails_the_check_keeps_its_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base("llama")
    assert merged_fault(base.model, IDS, 1e-3) is None
    whole = merged.merged_attention
    monkeypatch.setattr(merged, "merged_attention", lambda *args: whole(*args[:-1], 2 * args[-1]))
    assert "rows apart from their prefix differ by" in (merged_fault(base.model, IDS, 1e-3) or "")
    assert taken() == (False, "sdpa")

    def missing(*args: object) -> Tensor:
        raise AttributeError("no such operator")

    monkeypatch.setattr(merged, "merged_attention", missing)
    assert merged_fault(base.model, IDS, 1e-3) == "AttributeError: no such operator"
    assert taken() == (False, "sdpa")
