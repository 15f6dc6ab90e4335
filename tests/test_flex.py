"""FlexAttention over packed rows: what padded rows give, for every kind of attention; and who is allowed to take it.

On a CPU PyTorch has the values of FlexAttention, and neither its gradients nor its log-sum-exp (for sinks): for these
its formula, written out, stands in its place. The gradients of the real one are checked by ``pytest -m gpu``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvopt.base import flex
from kvopt.base.loading import Base
from kvopt.base.packing import one_line
from kvopt.base.prefix import gold_hidden, prefill
from kvopt.base.probe import Capability
from kvopt.config.model import ModelConfig
from kvopt.errors import InputError
from tests.attentions import BASES, base_of
from tests.test_packing import padding_only, ragged_batch, states_and_gradient

IDS = [90, 91, 140, 200, 77]


def with_block_masks(name: str) -> Base:
    """The same base, whose rows are packed in one line for FlexAttention."""
    base = base_of(name)
    model = copy.deepcopy(base.model)
    flex.use_flex(model)
    return replace(base, model=model, capability=replace(base.capability, flex=True, added=False))


def written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    score_mod: Callable[..., Tensor] | None,
    block_mask: Any,
    scale: float,
    enable_gqa: bool,
    return_aux: Any,
) -> Any:
    """FlexAttention as its formula: all logits, the mask's function on every pair, a softmax."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    group = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(group, 1).transpose(-1, -2) * scale
    if score_mod is not None:
        logits = score_mod(logits, None, None, None, None)
    queries, keys = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])[None]
    logits = logits.masked_fill(~block_mask.mask_mod(None, None, queries, keys), -torch.inf)
    output = logits.softmax(-1) @ value.repeat_interleave(group, 1)
    return (output, SimpleNamespace(lse=logits.logsumexp(-1))) if return_aux else output


@pytest.mark.parametrize("name", [name for name in BASES if name != "gpt-oss"])
@pytest.mark.parametrize("slots", [0, 11, 140])
def test_flex_attention_gives_packed_rows_the_states_of_padded_ones(name: str, slots: int) -> None:
    base, batch = with_block_masks(name), ragged_batch()
    with torch.no_grad():
        prefix = prefill(base, ids=torch.arange(20, 20 + slots))
        packed = gold_hidden(base, prefix, batch)
        padded = gold_hidden(padding_only(base_of(name)), prefix, batch)
    torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BASES)
def test_its_formula_gives_packed_rows_the_states_and_gradients_of_padded_ones(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex, "flex_attention", written_out)
    base, batch = with_block_masks(name), ragged_batch()
    prefix = prefill(base_of(name), ids=torch.arange(20, 31))
    packed = states_and_gradient(base, prefix, batch)
    padded = states_and_gradient(padding_only(base_of(name)), prefix, batch)
    for ours, theirs in zip(packed, padded, strict=True):
        assert theirs.norm() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BASES)
def test_other_masks_give_what_the_model_gave_before(name: str) -> None:
    base, batch = with_block_masks(name), ragged_batch()
    prefix = prefill(base_of(name), ids=torch.arange(20, 31))
    ours = states_and_gradient(padding_only(base), prefix, batch)
    for changed, own in zip(ours, states_and_gradient(padding_only(base_of(name)), prefix, batch), strict=True):
        torch.testing.assert_close(changed, own, rtol=1e-4, atol=1e-5)


def test_blocks_that_do_not_meet_are_not_computed() -> None:
    mask = flex.block_mask(one_line([128, 100, 28]), 256, None, torch.device("cpu"))
    assert mask.to_dense()[0, 0].tolist() == [[1, 1, 1, 0], [1, 1, 0, 1]]
    near = flex.block_mask(one_line([256]), 128, 100, torch.device("cpu"))
    assert near.to_dense()[0, 0].tolist() == [[1, 1, 0], [0, 1, 1]]


def fault(name: str) -> str | None:
    base = with_block_masks(name)
    geometry = base.geometry
    return flex.flex_fault(base.model, IDS, geometry.layer_types, geometry.sliding_window, 1e-3)


def test_the_check_runs_it_forward_and_backward_and_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "backward on CPU" in (fault("llama") or "")
    monkeypatch.setattr(flex, "flex_attention", written_out)
    for name in BASES:
        assert fault(name) is None, name
    monkeypatch.setattr(flex, "flex_attention", lambda *a, **k: written_out(*a, **k | {"scale": 2 * k["scale"]}))
    assert "packed and padded rows differ by" in (fault("llama") or "")


class OnGpu:
    """A model that says it is on a CUDA device."""

    def __init__(self, model: Any) -> None:
        self.model = copy.deepcopy(model)
        self.model.set_attn_implementation("sdpa")

    def __getattr__(self, name: str) -> Any:
        return torch.device("cuda") if name == "device" else getattr(self.model, name)


def taken(monkeypatch: pytest.MonkeyPatch, broken: bool = False, **settings: Any) -> tuple[Capability, str, list[str]]:
    """What is found on a GPU under these settings, the attention that the model has then, and what was said."""
    base, said = base_of("llama"), []
    monkeypatch.setattr(flex, "flex_fault", lambda *args: "it does not compile" if broken else None)
    model: Any = OnGpu(base.model)
    found = flex.with_flex(model, IDS, base.capability, ModelConfig(**settings), said.append)
    return found, model.config._attn_implementation, said


def test_a_gpu_takes_flex_attention_where_its_check_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    found, attention, said = taken(monkeypatch)
    assert (found.flex, attention, said) == (True, flex.NAME, [])
    found, attention, said = taken(monkeypatch, broken=True)
    assert (found.flex, attention) == (False, "sdpa")
    assert said == ["warning: rows are padded: FlexAttention cannot be used here: it does not compile"]
    for settings in ({"attention": "padded"}, {"attn_implementation": "sdpa"}):
        found, attention, said = taken(monkeypatch, **settings)
        assert (found.flex, attention, said) == (False, "sdpa", [])


def test_packed_rows_that_cannot_be_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of("llama")
    found = replace(base.capability, packs=False)
    with pytest.raises(InputError, match=r"^model.attention packed: rows of this base cannot be packed: .*auto"):
        flex.with_flex(base.model, IDS, found, ModelConfig(attention="packed"), print)
