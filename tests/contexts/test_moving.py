"""Moving, joining and shortening KV contexts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvopt.base.loading import Base, load_base
from kvopt.base.prefix import Prefix, prefill, prefix_cache, run_bodies
from kvopt.config.model import ModelConfig
from kvopt.contexts import KVContext, SoftContext, load_context, save_context
from kvopt.contexts.folder import rotated
from kvopt.contexts.moving import WAYS, joined, moved, shortened
from kvopt.errors import InputError
from kvopt.measure.score import score_tokens
from kvopt.task.seam import make_batch
from tests.tasks import Task, make_task
from tests.tiny import MODELS, save_tiny, tiny_base

CHANGED_ROPE = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 128},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128, "rope_theta": 10000.0,
    },
    "longrope": {
        "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 4.0,
        "original_max_position_embeddings": 128, "rope_theta": 10000.0,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def task(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tiny_base(request.param), tmp_path_factory.mktemp(request.param))


def template_kv(task: Task, tokens: int | None = None) -> KVContext:
    with torch.no_grad():
        prefix = prefill(task.base, ids=torch.tensor(task.encoded.prefix[:tokens]))
    return KVContext("c", prefix.stack())


def hidden_at(base: Base, states: Tensor, start: int, ids: Tensor) -> Tensor:
    """Hidden states of ``ids`` [B, n] behind the states, with bodies at positions from ``start``."""
    rows, width = ids.shape
    with torch.no_grad():
        return base.backbone(
            input_ids=ids,
            attention_mask=torch.ones(rows, len(states) + width, dtype=torch.long),
            position_ids=torch.arange(start, start + width).expand(rows, -1),
            past_key_values=prefix_cache(Prefix.unstack(states, torch.float32)),
            use_cache=False,
        ).last_hidden_state


def logits_at(base: Base, states: Tensor, start: int) -> Tensor:
    return base.model.lm_head(hidden_at(base, states, start, torch.tensor([[40, 41, 42, 43], [50, 51, 52, 53]])))


@pytest.mark.parametrize("offset", [1, 37, 300])
def test_a_moved_prefix_with_bodies_moved_equally_gives_the_same_logits(task: Task, offset: int) -> None:
    context = template_kv(task)
    there = moved(context, offset, task.base)
    ours = logits_at(task.base, context.states, context.tokens)
    torch.testing.assert_close(logits_at(task.base, there.states, offset + context.tokens), ours, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits_at(task.base, there.states, context.tokens), ours, atol=1e-2)


def test_moved_keys_are_those_that_the_base_computes_there(task: Task) -> None:
    ids = torch.tensor([task.encoded.prefix])
    cache = DynamicCache()
    with torch.no_grad():
        task.base.backbone(
            input_ids=ids, position_ids=torch.arange(60, 60 + ids.shape[1])[None], past_key_values=cache, use_cache=True
        )
    keys = torch.stack([layer.keys[0].transpose(0, 1) for layer in cache.layers], dim=1)
    torch.testing.assert_close(moved(template_kv(task), 60, task.base).states[:, :, 0], keys, rtol=1e-4, atol=2e-5)


def test_a_moved_context_is_read_back_at_position_0(task: Task, tmp_path: Path) -> None:
    context = template_kv(task)
    save_context(moved(context, 41, task.base), tmp_path / "c", task.base, first=41)
    again = load_context(tmp_path / "c", task.base)
    torch.testing.assert_close(again.states, context.states, rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", CHANGED_ROPE)
def test_scaled_rope_moves_exactly_inside_its_window_and_is_refused_by_name_beyond(kind: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama", "chatml", rope_parameters=CHANGED_ROPE[kind])
    base = load_base(ModelConfig(base=str(tmp_path), dtype="float32", device="cpu"))
    with torch.no_grad():
        states = prefill(base, ids=torch.arange(20, 32)).stack()
    context, far = KVContext("c", states), base.geometry.window - 20
    ours = logits_at(base, states, 12)
    torch.testing.assert_close(logits_at(base, moved(context, far, base).states, far + 12), ours, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="at most") as caught:
        moved(context, base.geometry.window, base)
    assert (f"'{kind}'" in str(caught.value)) == (kind in ("dynamic", "longrope"))


def test_an_offset_below_0_is_refused(task: Task) -> None:
    with pytest.raises(InputError, match="before the start"):
        moved(template_kv(task), -1, task.base)


def test_two_halves_computed_together_are_joined_to_the_whole(task: Task) -> None:
    """The second half's slots, moved to 0 and joined again, are the template itself."""
    whole = template_kv(task)
    half = whole.tokens // 2
    second = KVContext("b", rotated(whole.states[half:], -half, task.base.rope))
    pair = joined(KVContext("a", whole.states[:half]), second, task.base, "ab")
    assert pair.tokens == whole.tokens
    torch.testing.assert_close(pair.states, whole.states, rtol=1e-5, atol=2e-5)  # type: ignore[union-attr]


def test_soft_prompts_are_joined_end_to_end_and_with_a_cache_as_a_cache(task: Task) -> None:
    with torch.no_grad():
        embeddings = task.base.embed(torch.tensor(task.encoded.prefix)).float()
    first, second = SoftContext("a", embeddings[:5]), SoftContext("b", embeddings[5:9])
    both = joined(first, second, task.base, "ab")
    assert isinstance(both, SoftContext)
    torch.testing.assert_close(both.embeddings, embeddings[:9])
    mixed = joined(first, template_kv(task, 6), task.base, "ab")
    assert isinstance(mixed, KVContext)
    assert mixed.tokens == 11
    torch.testing.assert_close(mixed.states[:5], template_kv(task, 5).states, rtol=1e-5, atol=1e-5)


def test_pairs_that_leave_no_room_for_bodies_are_refused(task: Task) -> None:
    g = task.base.geometry
    long = KVContext("long", torch.zeros(g.window - 3, g.layers, 2, g.kv_heads, g.head_dim))
    with pytest.raises(InputError, match="window"):
        joined(long, template_kv(task, 6), task.base, "ab")


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_shortening_keeps_the_sink_and_as_many_slots_as_asked(task: Task, way: str) -> None:
    context = template_kv(task)
    short = shortened(context, 8, way, task.base, task.encoded.rows)  # type: ignore[arg-type]
    assert short.states.shape == (8, *context.states.shape[1:])
    assert short.states.isfinite().all()
    if way != "refitted":
        torch.testing.assert_close(short.states[0, :, 1], context.states[0, :, 1])


def test_the_last_slots_keep_their_distance_to_the_bodies(task: Task) -> None:
    context = template_kv(task)
    short = shortened(context, 5, "last", task.base)
    keep = [0, *range(context.tokens - 4, context.tokens)]
    torch.testing.assert_close(
        logits_at(task.base, short.states, 5),
        logits_at(task.base, context.states[keep], context.tokens),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


def test_refitted_slots_cost_less_kl_than_the_first_or_the_last_ones(tmp_path: Path) -> None:
    task = make_task(tiny_base("llama"), tmp_path)
    context = template_kv(task)
    costs = {}
    for way in WAYS:
        short = shortened(context, 12, way, task.base, task.encoded.rows)
        costs[way] = float(score_tokens(task.base, short, task.encoded, task.reference).kl.mean())
    assert costs["refitted"] < min(costs["first"], costs["last"], costs["attention"])


@pytest.mark.parametrize("tokens", [0, 1000])
def test_as_many_slots_as_before_or_none_are_refused(task: Task, tokens: int) -> None:
    with pytest.raises(InputError, match="give 1 to"):
        shortened(template_kv(task), tokens, "first", task.base)


def test_the_attention_of_the_bodies_is_unchanged_by_the_helper(task: Task) -> None:
    """``logits_at`` at the usual position is what kvopt runs (so the comparisons above mean what they say)."""
    context = template_kv(task)
    batch = make_batch(task.encoded.rows, [0])
    with torch.no_grad():
        ours = run_bodies(task.base, context.prefix(task.base), batch)
    torch.testing.assert_close(hidden_at(task.base, context.states, context.tokens, batch.ids), ours)
