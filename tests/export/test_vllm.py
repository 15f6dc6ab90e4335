"""Contexts in vLLM's paged cache: packing, rules, and the connector's calls against stand-ins of vLLM's classes.

No server is run here: the stand-ins hold only what ``KVConnectorBase_V1`` documents.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvopt.base.loading import Base
from kvopt.contexts import KVContext
from kvopt.errors import InputError
from kvopt.export.vllm_connector import engine, paging
from kvopt.export.vllm_connector import stored_context as stored
from kvopt.export.vllm_connector.server import Load, Server
from kvopt.export.writing import export
from tests.export.readers import saved
from tests.tasks import make_task
from tests.tiny import MODELS, tiny_base, tiny_folder

HEADS, WIDTH, SLOTS, BLOCK, BLOCKS = 4, 8, 32, 16, 9
LAYOUTS = {
    "keys and values first": (2, BLOCKS, BLOCK, HEADS, WIDTH),
    "blocks first": (BLOCKS, 2, BLOCK, HEADS, WIDTH),
}


def empty_cache(layout: str, heads: int = HEADS, width: int = WIDTH, block: int = BLOCK) -> Tensor:
    shape = {HEADS: heads, WIDTH: width, BLOCK: block}
    return torch.full([shape.get(n, n) for n in LAYOUTS[layout]], torch.nan)


def gathered(cache: Tensor, layout: str, block_ids: list[int], count: int) -> tuple[Tensor, Tensor]:
    """Keys and values [H, count, d] of a request as an attention kernel finds them: block table, place in block."""
    keys, values = [], []
    for position in range(count):
        block, place = block_ids[position // BLOCK], position % BLOCK
        if layout == "keys and values first":
            keys.append(cache[0, block, place])
            values.append(cache[1, block, place])
        else:
            keys.append(cache[block, 0, place])
            values.append(cache[block, 1, place])
    return torch.stack(keys, dim=1), torch.stack(values, dim=1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_slots_are_where_the_block_table_says_in_every_layout(layout: str) -> None:
    keys, values = torch.randn(2, HEADS, SLOTS, WIDTH)
    cache, blocks = empty_cache(layout), [7, 2]
    paging.write_slots(cache, keys, values, paging.paged_slots(blocks, BLOCK, 0, SLOTS))
    found = gathered(cache, layout, blocks, SLOTS)
    assert torch.equal(found[0], keys)
    assert torch.equal(found[1], values)
    assert int(cache.isfinite().sum()) == keys.numel() + values.numel(), "nothing else was written"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_rest_of_a_context_is_loaded_behind_blocks_that_are_cached_already(layout: str) -> None:
    keys, values = torch.randn(2, HEADS, SLOTS, WIDTH)
    cache, blocks = empty_cache(layout), [5, 3]
    slots = paging.paged_slots(blocks, BLOCK, BLOCK, SLOTS)
    paging.write_slots(cache, keys[:, BLOCK:], values[:, BLOCK:], slots)
    found, _ = gathered(cache, layout, blocks, SLOTS)
    assert torch.equal(found[:, BLOCK:], keys[:, BLOCK:])
    assert found[:, :BLOCK].isnan().all()


def test_a_cache_cut_into_smaller_kernel_blocks_gets_the_same_slots() -> None:
    """Scheduler blocks of 16 that the kernel sees as two of 8 each."""
    keys, values = torch.randn(2, HEADS, SLOTS, WIDTH)
    cache = torch.full((BLOCKS * 2, 2, BLOCK // 2, HEADS, WIDTH), torch.nan)
    paging.write_slots(cache, keys, values, paging.paged_slots([7, 2], BLOCK, 0, SLOTS))
    whole = cache.view(BLOCKS, 2, 2, BLOCK // 2, HEADS, WIDTH).transpose(1, 2).reshape(BLOCKS, 2, BLOCK, HEADS, WIDTH)
    assert torch.equal(gathered(whole, "blocks first", [7, 2], SLOTS)[0], keys)


def test_16_bit_caches_hold_rounded_values_and_others_are_refused() -> None:
    keys, values = torch.randn(2, HEADS, SLOTS, WIDTH)
    cache = empty_cache("blocks first").bfloat16()
    paging.write_slots(cache, keys, values, paging.paged_slots([1, 2], BLOCK, 0, SLOTS))
    assert torch.equal(gathered(cache, "blocks first", [1, 2], SLOTS)[0], keys.bfloat16())
    with pytest.raises(ValueError, match="uint8"):
        paging.paged_views(torch.zeros(LAYOUTS["blocks first"], dtype=torch.uint8), HEADS, WIDTH)


@pytest.mark.parametrize("shape", [(9, 16, 4, 8), (9, 3, 16, 4, 8), (9, 2, 16, 4, 7), (2, 2, 16, 4, 8), (9, 4, 16, 16)])
def test_layouts_that_are_not_known_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="unknown layout"):
        paging.paged_views(torch.zeros(shape), HEADS, WIDTH)


def test_too_few_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="do not hold position 31"):
        paging.paged_slots([1], BLOCK, 0, SLOTS)


@pytest.mark.parametrize(
    ("heads", "ranks", "shares"),
    [
        (8, 1, [(0, 8)]),
        (8, 4, [(0, 2), (2, 4), (4, 6), (6, 8)]),
        (2, 4, [(0, 1), (0, 1), (1, 2), (1, 2)]),
        (1, 2, [(0, 1), (0, 1)]),
    ],
)
def test_heads_divide_among_tensor_parallel_ranks(heads: int, ranks: int, shares: list[tuple[int, int]]) -> None:
    assert [stored.heads_of_rank(heads, ranks, rank) for rank in range(ranks)] == [slice(*s) for s in shares]


@pytest.mark.parametrize(("heads", "ranks"), [(3, 2), (8, 3), (2, 3)])
def test_heads_that_do_not_divide_are_refused(heads: int, ranks: int) -> None:
    with pytest.raises(ValueError, match="do not divide"):
        stored.heads_of_rank(heads, ranks, 0)


def test_contexts_fill_blocks_or_the_mend_is_named() -> None:
    stored.check_blocks("c", 32, 16)
    stored.check_blocks("c", 40, 16, allow_partial=True)
    with pytest.raises(ValueError, match="shorten it to 32 slots"):
        stored.check_blocks("c", 40, 16)
    with pytest.raises(ValueError, match="do not fill blocks of 16: learn it"):
        stored.check_blocks("c", 9, 16)


@pytest.mark.parametrize("name", ["model.layers.12.self_attn.attn", "language_model.model.layers.12.attn", "h.12.attn"])
def test_layer_names_are_read(name: str) -> None:
    assert paging.layer_index(name) == 12


# ---- the whole way: export, server start, scheduling, writing


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the vLLM modules that the connector imports."""

    class KVConnectorMetadata:
        pass

    class KVConnectorBase_V1:
        def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any = None) -> None:
            self.metadata: Any = None

        def bind_connector_metadata(self, metadata: Any) -> None:
            self.metadata = metadata

        def _get_connector_metadata(self) -> Any:
            return self.metadata

    base = ModuleType("base")
    base.KVConnectorBase_V1, base.KVConnectorMetadata = KVConnectorBase_V1, KVConnectorMetadata  # type: ignore[attr-defined]
    state = ModuleType("parallel_state")
    state.get_tensor_model_parallel_rank = lambda: 0  # type: ignore[attr-defined]
    package = "vllm.distributed.kv_transfer.kv_connector.v1"
    for name in [".".join(package.split(".")[: i + 1]) for i in range(5)]:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, f"{package}.base", base)
    monkeypatch.setitem(sys.modules, "vllm.distributed.parallel_state", state)
    monkeypatch.setattr(engine, "_MADE", {})


def settings(*folders: Path, block: int = BLOCK, ranks: int = 1, policy: str | None = "fail", **extra: Any) -> Any:
    """What a connector reads of a VllmConfig."""
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(
            kv_connector_extra_config={"contexts": [str(folder) for folder in folders], **extra},
            kv_load_failure_policy=policy,
        ),
        cache_config=SimpleNamespace(block_size=block),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
    )


def exported(base: Base, folder: Path, tokens: int = SLOTS) -> tuple[KVContext, list[int]]:
    """A context exported for vLLM into ``folder``, and its placeholder ids."""
    task = make_task(base, folder.parent / f"{folder.name}-task", count=4)
    context = saved(task, "kv", folder.parent / f"{folder.name}-context", tokens)
    export(folder.parent / f"{folder.name}-context", "vllm", folder)
    assert isinstance(context, KVContext)
    return context, json.loads((folder / "vllm.json").read_text())["placeholder_ids"]


def connect(config: Any, role: str, *known: Any) -> Any:
    return engine.made()["KvoptConnector"](config, role, *known)


def metadata(loads: list[Load]) -> Any:
    return engine.made()["KvoptMetadata"](loads)


def request(ids: list[int], name: str = "r", xargs: dict[str, Any] | None = None, **params: Any) -> Any:
    sampling = SimpleNamespace(extra_args=xargs, prompt_logprobs=params.pop("prompt_logprobs", None))
    return SimpleNamespace(request_id=name, prompt_token_ids=ids, sampling_params=sampling, **params)


def blocks(*ids: int) -> Any:
    return SimpleNamespace(get_block_ids=lambda: (list(ids),))


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("kind", MODELS)
def test_a_request_with_the_placeholders_gets_the_context_into_its_blocks(kind: str, tmp_path: Path) -> None:
    base = tiny_base(kind)
    context, ids = exported(base, tmp_path / "out")
    scheduler, worker = (connect(settings(tmp_path / "out"), role) for role in ("scheduler", "worker"))
    wanted, other = request([*ids, 40, 41]), request([40, 41, 42], "other")
    assert scheduler.get_num_new_matched_tokens(wanted, 0) == (SLOTS, False)
    assert scheduler.get_num_new_matched_tokens(other, 0) == (0, False)
    scheduler.update_state_after_alloc(wanted, blocks(6, 1, 4), SLOTS)
    scheduler.update_state_after_alloc(other, blocks(2), 0)
    metadata = pickle.loads(pickle.dumps(scheduler.build_connector_meta(None)))
    assert scheduler.build_connector_meta(None).loads == [], "each request is loaded once"
    g = base.geometry
    caches = {
        f"model.layers.{i}.self_attn.attn": torch.full((2, BLOCKS, BLOCK, g.kv_heads, g.head_dim), torch.nan)
        for i in range(g.layers)
    }
    worker.register_kv_caches(caches)
    worker.bind_connector_metadata(metadata)
    worker.start_load_kv(SimpleNamespace(no_compile_layers={}))
    prefix = context.prefix(base)
    for i, cache in enumerate(caches.values()):
        keys, values = gathered(cache, "keys and values first", [6, 1], SLOTS)
        assert torch.equal(keys, prefix.keys[i])
        assert torch.equal(values, prefix.values[i])


@pytest.mark.usefixtures("vllm")
def test_a_context_that_vllm_has_cached_in_part_is_loaded_from_there(tmp_path: Path) -> None:
    base = tiny_base("llama")
    _, ids = exported(base, tmp_path / "out")
    scheduler = connect(settings(tmp_path / "out"), "scheduler", None)
    again = request([*ids, 40])
    assert scheduler.get_num_new_matched_tokens(again, BLOCK) == (BLOCK, False)
    assert scheduler.get_num_new_matched_tokens(again, SLOTS) == (0, False)
    scheduler.update_state_after_alloc(again, blocks(6, 1, 4), BLOCK)
    (load,) = scheduler.build_connector_meta(None).loads
    assert (load.start, load.stop) == (BLOCK, SLOTS)


@pytest.mark.usefixtures("vllm")
def test_workers_of_versions_that_register_no_caches_find_them_in_the_layers(tmp_path: Path) -> None:
    base = tiny_base("llama")
    context, _ = exported(base, tmp_path / "out")
    worker = connect(settings(tmp_path / "out"), "worker")
    g = base.geometry
    layers = {
        f"model.layers.{i}.self_attn.attn": SimpleNamespace(
            kv_cache=[torch.zeros(2, BLOCKS, BLOCK, g.kv_heads, g.head_dim)]
        )
        for i in range(g.layers)
    }
    layers["model.layers.0.mlp"] = SimpleNamespace()
    worker.bind_connector_metadata(metadata([Load(0, (3, 8), 0, SLOTS)]))
    worker.start_load_kv(SimpleNamespace(no_compile_layers=layers, virtual_engine=0))
    keys, _ = gathered(layers["model.layers.1.self_attn.attn"].kv_cache[0], "keys and values first", [3, 8], SLOTS)
    assert torch.equal(keys, context.prefix(base).keys[1])


class PackedBackend:
    """A backend that lays its cache out as no other does: values first, heads before slots, keys negated."""

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        assert key.shape == value.shape == (len(slots), cache.shape[1], cache.shape[3] // 2)
        assert key.is_contiguous()
        assert key.dtype == cache.dtype
        assert layer.impl is self
        for n, slot in enumerate(slots.tolist()):
            cache[slot // BLOCK, :, slot % BLOCK] = torch.cat([value[n], -key[n]], dim=-1)


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("registers", [True, False])
def test_the_backends_own_writer_fills_the_cache(registers: bool, tmp_path: Path) -> None:
    base = tiny_base("llama")
    context, _ = exported(base, tmp_path / "out")
    g = base.geometry
    names = [f"model.layers.{i}.self_attn.attn" for i in range(g.layers)]
    caches = {name: torch.zeros(BLOCKS, g.kv_heads, BLOCK, 2 * g.head_dim).bfloat16() for name in names}
    layers = {name: SimpleNamespace(impl=PackedBackend(), kv_cache=cache) for name, cache in caches.items()}
    config = settings(tmp_path / "out")
    config.compilation_config = SimpleNamespace(static_forward_context=layers)
    worker = connect(config, "worker")
    if registers:
        worker.register_kv_caches(caches)
    worker.bind_connector_metadata(metadata([Load(0, (3, 8), 0, SLOTS)]))
    worker.start_load_kv(SimpleNamespace(no_compile_layers=layers, virtual_engine=0))
    prefix = context.prefix(base)
    for i, cache in enumerate(caches.values()):
        found = torch.cat([cache[3], cache[8]], dim=1)
        assert torch.equal(found[..., : g.head_dim], prefix.values[i].bfloat16())
        assert torch.equal(-found[..., g.head_dim :], prefix.keys[i].bfloat16())


@pytest.mark.usefixtures("vllm")
def test_a_cache_that_nobody_can_fill_stops_the_server_at_its_start(tmp_path: Path) -> None:
    base = tiny_base("llama")
    exported(base, tmp_path / "out")
    g = base.geometry
    unknown = torch.zeros(BLOCKS, g.kv_heads, BLOCK, 2 * g.head_dim)
    worker = connect(settings(tmp_path / "out"), "worker")
    with pytest.raises(ValueError, match=r"layers\.0.*unknown layout.*has no do_kv_cache_update"):
        worker.register_kv_caches({"model.layers.0.self_attn.attn": unknown})
    written = {"model.layers.0.self_attn.attn": SimpleNamespace(impl=PackedBackend())}
    config = settings(tmp_path / "out")
    config.compilation_config = SimpleNamespace(static_forward_context=written)
    worker = connect(config, "worker")
    worker.register_kv_caches({"model.layers.0.self_attn.attn": unknown})
    with pytest.raises(ValueError, match="int8"):
        worker.register_kv_caches({"model.layers.0.self_attn.attn": unknown.to(torch.int8)})


@pytest.mark.usefixtures("vllm")
def test_each_rank_holds_its_own_heads(tmp_path: Path) -> None:
    base = tiny_base("llama")
    context, _ = exported(base, tmp_path / "out")
    server = Server(settings(tmp_path / "out", ranks=2))
    cache = torch.zeros(2, BLOCKS, BLOCK, 1, base.geometry.head_dim)
    server.write(Load(0, (3, 8), 0, SLOTS), {"model.layers.2.attn": cache}, {}, 1)
    keys, _ = gathered(cache, "keys and values first", [3, 8], SLOTS)
    assert torch.equal(keys, context.prefix(base).keys[2][1:2])


def test_contexts_have_placeholders_of_their_own_which_say_their_content(tmp_path: Path) -> None:
    base = tiny_base("llama")
    _, first = exported(base, tmp_path / "a")
    _, again = exported(base, tmp_path / "b")
    _, other = exported(base, tmp_path / "c", tokens=48)
    assert first == again
    assert first[:BLOCK] != other[:BLOCK]
    assert not set(first) & set(base.tokenizer.all_special_ids)
    with pytest.raises(ValueError, match="both named c: give them names"):
        Server(settings(tmp_path / "a", tmp_path / "c"))
    with pytest.raises(ValueError, match="same content"):
        Server(settings(contexts={"one": str(tmp_path / "a"), "two": str(tmp_path / "b")}))
    server = Server(settings(contexts={"one": str(tmp_path / "a"), "two": str(tmp_path / "c")}))
    assert [context.name for context in server.contexts] == ["one", "two"]
    assert server.asked_for([*first, 40]) == 0
    assert server.asked_for([*other, 40]) == 1
    assert server.asked_for(first) is None, "a prompt must go on behind its context"


def test_servers_refuse_at_the_start_what_they_cannot_serve(tmp_path: Path) -> None:
    exported(tiny_base("llama"), tmp_path / "out")
    with pytest.raises(ValueError, match="do not fill blocks of 64"):
        Server(settings(tmp_path / "out", block=64))
    Server(settings(tmp_path / "out", block=64, allow_partial_block=True))
    with pytest.raises(ValueError, match="do not divide"):
        Server(settings(tmp_path / "out", ranks=3))
    with pytest.raises(ValueError, match="needs"):
        Server(settings())
    with pytest.raises(ValueError, match="not a context exported"):
        Server(settings(tmp_path))


def test_slots_that_do_not_fill_blocks_are_refused_at_the_export(tmp_path: Path) -> None:
    task = make_task(tiny_base("llama"), tmp_path / "task", count=4)
    saved(task, "kv", tmp_path / "c", 20)
    with pytest.raises(InputError, match="shorten it to 16 slots"):
        export(tmp_path / "c", "vllm", tmp_path / "out", options={"partial_block": False})
    assert not (tmp_path / "out").exists()
    export(tmp_path / "c", "vllm", tmp_path / "out", options={"block_size": 4})
    export(tmp_path / "c", "vllm", tmp_path / "partial")
    assert "in part (4), which vLLM loads from 0.32 on" in (tmp_path / "partial" / "README.md").read_text()


def test_the_connector_asks_for_nothing_but_torch_safetensors_and_vllm(tmp_path: Path) -> None:
    exported(tiny_base("llama"), tmp_path / "out")
    sources = sorted((tmp_path / "out" / "kvopt_vllm_connector").glob("*.py"))
    assert len(sources) == 7
    for source in sources:
        assert not re.search(r"^\s*(from|import) kvopt", source.read_text(), flags=re.M)


# ---- misuse is an error


def asked(scheduler: Any, wanted: Any, computed: int = 0) -> list[Load]:
    """What the scheduler tells the workers of one request, as vLLM asks it."""
    count, _ = scheduler.get_num_new_matched_tokens(wanted, computed)
    scheduler.update_state_after_alloc(wanted, blocks(6, 1, 4), count)
    return list(scheduler.build_connector_meta(None).loads)


MISUSE = {
    "prompt_logprobs": (lambda ids: request([*ids, 40], prompt_logprobs=0), "prompt_logprobs"),
    "no cache read": (lambda ids: request([*ids, 40], skip_reading_prefix_cache=True), "skip_reading_prefix_cache"),
    "alone": (lambda ids: request(ids), "placeholders of c alone"),
    "bos before": (lambda ids: request([1, *ids, 40]), "does not begin with those"),
    "tokenized again": (lambda ids: request([*ids[:-1], 41, 40]), "does not begin with those"),
    "cut": (lambda ids: request(ids[:-3]), "does not begin with those"),
    "unknown name": (lambda ids: request([*ids, 40], xargs={"kvopt": "kv-99"}), "no context 'kv-99' here: this server"),
    "named, not given": (lambda ids: request([40, 41], xargs={"kvopt": "c"}), "does not begin with the placeholder"),
}


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("case", MISUSE)
def test_a_misused_request_fails_and_says_why(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, ids = exported(tiny_base("llama"), tmp_path / "out")
    make, reason = MISUSE[case]
    scheduler, worker = (connect(settings(tmp_path / "out"), role) for role in ("scheduler", "worker"))
    (load,) = asked(scheduler, make(ids))
    assert load.context is None
    assert reason in caplog.text
    assert "refused" in caplog.text
    worker.bind_connector_metadata(metadata([load]))
    worker.start_load_kv(SimpleNamespace(no_compile_layers={}))
    assert worker.get_block_ids_with_load_errors() == {6}
    assert worker.get_block_ids_with_load_errors() == set()
    right = request([*ids, 40], "next", xargs={"kvopt": "c"}, skip_reading_prefix_cache=False)
    (load,) = asked(scheduler, right)
    assert load.context == 0, "the next request is served"


@pytest.mark.usefixtures("vllm")
def test_a_refused_request_claims_what_vllm_would_compute_so_that_its_own_block_fails(tmp_path: Path) -> None:
    _, ids = exported(tiny_base("llama"), tmp_path / "out")
    scheduler = connect(settings(tmp_path / "out"), "scheduler")
    wanted = request([*ids, 40], skip_reading_prefix_cache=True)
    assert scheduler.get_num_new_matched_tokens(wanted, BLOCK) == (SLOTS - BLOCK, False)
    assert wanted.skip_reading_prefix_cache is False, "vLLM takes nothing from a connector otherwise"
    assert scheduler.get_num_new_matched_tokens(wanted, BLOCK) == (SLOTS - BLOCK, False), "asked twice"
    scheduler.update_state_after_alloc(wanted, blocks(6, 1, 4), SLOTS - BLOCK)
    (load,) = scheduler.build_connector_meta(None).loads
    assert scheduler._server.refused_blocks(load) == {1}, "not the block that other requests share"


@pytest.mark.usefixtures("vllm")
def test_text_without_placeholders_is_nobodys_misuse(tmp_path: Path) -> None:
    _, ids = exported(tiny_base("llama"), tmp_path / "out")
    scheduler = connect(settings(tmp_path / "out"), "scheduler")
    for prompt in ([40, 41], [ids[0], 41, ids[1]], [*ids[:3], 40]):
        assert scheduler.get_num_new_matched_tokens(request(prompt, prompt_logprobs=1), 0) == (0, False)
    embeds = request([])
    embeds.prompt_token_ids = None
    assert scheduler.get_num_new_matched_tokens(embeds, 0) == (0, False)


@pytest.mark.usefixtures("vllm")
def test_a_server_that_would_compute_failed_blocks_itself_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, ids = exported(tiny_base("llama"), tmp_path / "out")
    with pytest.raises(ValueError, match="kv_load_failure_policy is 'recompute'"):
        Server(settings(tmp_path / "out", policy="recompute"))
    older = connect(settings(tmp_path / "out", policy=None), "scheduler")
    assert asked(older, request(ids)) == []
    assert "served without its context" in caplog.text


def test_another_base_is_refused_at_the_start(tmp_path: Path) -> None:
    """The hashes are those that kvopt records of a base, by its own functions."""
    exported(tiny_base("llama"), tmp_path / "out")
    server = Server(settings(tmp_path / "out"))
    assert set(server.contexts[0].base) == {"weights", "config"}
    own = tiny_folder("llama")
    server.check_base(SimpleNamespace(model=str(own)))
    for file, what in (("model.safetensors", "weights"), ("config.json", "config")):
        other = tmp_path / what
        shutil.copytree(own, other)
        text = (other / file).read_bytes()
        changed = json.dumps(json.loads(text) | {"rope_theta": 7.0}).encode() if what == "config" else text + b"0"
        (other / file).write_bytes(changed)
        with pytest.raises(ValueError, match=f"made for another base than .*: it differs in its {what}"):
            server.check_base(SimpleNamespace(model=str(other)))
        Server(settings(tmp_path / "out", check_base=False)).check_base(SimpleNamespace(model=str(other)))
    with pytest.raises(ValueError, match="cannot be compared"):
        server.check_base(SimpleNamespace(model=str(tmp_path)))


@pytest.mark.usefixtures("vllm")
def test_the_scheduler_compares_the_bases(tmp_path: Path) -> None:
    exported(tiny_base("llama"), tmp_path / "out")
    config = settings(tmp_path / "out")
    config.model_config = SimpleNamespace(model=str(tiny_folder("qwen3")))
    with pytest.raises(ValueError, match="made for another base"):
        connect(config, "SCHEDULER")
    connect(config, "WORKER")
