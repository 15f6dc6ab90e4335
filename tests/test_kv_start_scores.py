"""The scores by which ``tools/compare_kv_starts.py`` keeps slots, against whole sequences through transformers and the
formulas as loops in float64.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kvopt.base.loading import Base
from kvopt.base.prefix import prefill
from kvopt.task.seam import Row
from tests.naive import naive_attention_weights
from tests.tiny import tiny_base

PATH = Path(__file__).resolve().parent.parent / "tools" / "compare_kv_starts.py"
TEXT = list(range(20, 31))
PROBE = [Row("a", (40, 41, 42), (43, 44)), Row("b", (50, 51), (52, 53, 54, 55))]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """tools/compare_kv_starts.py."""
    spec = importlib.util.spec_from_file_location("compare_kv_starts", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scores(tool: ModuleType, base: Base, *, gradient: bool) -> Tensor:
    with torch.no_grad():
        prefix = prefill(base, ids=torch.tensor(TEXT))
    return tool.importance(base, prefix, PROBE, gradient=gradient)  # type: ignore[no-any-return]


def sequence(row: Row) -> list[int]:
    return [*TEXT, *row.body, *row.gold][:-1]


def test_kvzip_keeps_the_largest_weight_of_any_query_head_and_token(tool: ModuleType) -> None:
    base = tiny_base("llama")
    groups = base.model.config.num_attention_heads // base.geometry.kv_heads
    expected = torch.zeros(base.geometry.layers, base.geometry.kv_heads, len(TEXT))
    for row in PROBE:
        weights = naive_attention_weights(base, sequence(row))
        for layer, heads in enumerate(weights):
            for head, table in enumerate(heads):
                for asking in table[len(TEXT) :]:
                    best = expected[layer, head // groups]
                    best.copy_(torch.maximum(best, asking[: len(TEXT)]))
    torch.testing.assert_close(scores(tool, base, gradient=False), expected, rtol=1e-2, atol=1e-4)


def test_kvgrad_multiplies_weight_written_norm_and_gradient_norm(tool: ModuleType) -> None:
    base = tiny_base("llama")
    config = base.model.config
    groups, size = config.num_attention_heads // base.geometry.kv_heads, base.geometry.head_dim
    expected = torch.zeros(base.geometry.layers, base.geometry.kv_heads, len(TEXT), dtype=torch.float64)
    for row in PROBE:
        ids = sequence(row)
        weights, slopes = naive_attention_weights(base, ids).double(), attention_slopes(base, ids)
        values = base.model(torch.tensor([ids]), use_cache=True).past_key_values.layers
        for layer in range(base.geometry.layers):
            projection = base.backbone.layers[layer].self_attn.o_proj.weight.double()
            for head in range(config.num_attention_heads):
                mine = projection[:, head * size : (head + 1) * size]
                for slot in range(len(TEXT)):
                    written = (mine @ values[layer].values[0, head // groups, slot].double()).norm()
                    for place in range(len(TEXT), len(ids)):
                        score = weights[layer, head, place, slot] * written * slopes[layer][place].norm()
                        old = expected[layer, head // groups, slot]
                        expected[layer, head // groups, slot] = max(old, score)
    torch.testing.assert_close(scores(tool, base, gradient=True).double(), expected, rtol=2e-2, atol=1e-6)


def attention_slopes(base: Base, ids: list[int]) -> list[Tensor]:
    """For each layer the gradient [n, D] of the squared norm of the probe's last states by what attention adds."""
    added = [
        torch.zeros(1, len(ids), base.geometry.hidden_size, requires_grad=True) for _ in range(base.geometry.layers)
    ]
    last: list[Tensor] = []
    hooks = [
        layer.self_attn.register_forward_hook(
            lambda module, inputs, output, extra=extra: (output[0] + extra, output[1])
        )
        for layer, extra in zip(base.backbone.layers, added, strict=True)
    ]

    def keep(module: Any, inputs: Any, output: Any) -> None:
        last.append(output[0] if isinstance(output, tuple) else output)

    hooks.append(base.backbone.layers[-1].register_forward_hook(keep))
    try:
        base.backbone(torch.tensor([ids]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    objective = last[0][0, len(TEXT) :].square().sum()
    return [slope[0].double() for slope in torch.autograd.grad(objective, added)]


def test_the_probe_says_the_whole_text_once_in_chunks(tool: ModuleType) -> None:
    base, ids = tiny_base("llama"), [*range(5, 200)] * 6
    rows = tool.repeats(base, ids)
    assert [token for row in rows for token in row.gold[:-1]] == ids
    assert all(len(row.gold) - 1 <= tool.CHUNK for row in rows)
