"""Rows packed into lines: the same hidden states and gradients as padded rows, with fewer positions computed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvopt.base.loading import Base
from kvopt.base.packing import _first_fit, pack
from kvopt.base.prefix import Prefix, empty_prefix, gold_hidden, lines_for, packing_for, prefill
from kvopt.task.seam import Batch, Row, make_batch
from tests.attentions import BASES, base_of
from tests.tiny import tiny_base

BODIES, GOLD = (9, 2, 6, 4, 14, 3), (5, 2, 1, 7, 3, 2)


def ragged_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, 200, (count,), generator=generator).tolist())

    rows = [Row(str(i), ids(body), ids(gold)) for i, (body, gold) in enumerate(zip(BODIES, GOLD, strict=True))]
    return make_batch(rows, range(len(rows)))


def padding_only(base: Base) -> Base:
    return replace(base, attention="padded")


@pytest.mark.parametrize("model", BASES)
@pytest.mark.parametrize("slots", [0, 11])
def test_packed_rows_have_the_states_and_gradients_of_padded_ones(model: str, slots: int) -> None:
    base, batch = base_of(model), ragged_batch()
    assert base.capability.packs
    assert pack(batch.mask.sum(-1).tolist(), slots) is not None
    prefix = prefill(base, ids=torch.arange(20, 20 + slots)) if slots else empty_prefix(base)
    results = [states_and_gradient(which, prefix, batch) for which in (base, padding_only(base))]
    for packed, padded in zip(*results, strict=True):
        assert packed.norm() > 0 or slots == 0
        torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-5)


def states_and_gradient(base: Base, prefix: Prefix, batch: Batch) -> tuple[Tensor, Tensor]:
    leaf = prefix.stack().detach().requires_grad_()
    hidden = gold_hidden(base, Prefix.unstack(leaf, base.dtype) if len(prefix) else prefix, batch)
    if len(prefix) == 0:
        return hidden.detach(), leaf.detach()
    (hidden * torch.arange(1, len(hidden) + 1, device=hidden.device)[:, None]).mean().backward()
    assert leaf.grad is not None
    return hidden.detach(), leaf.grad


def test_the_setting_decides_whether_rows_are_packed() -> None:
    base, batch, same = tiny_base("gemma3"), ragged_batch(), make_batch([Row("r", (5, 6), (7,))] * 2, [0, 1])
    assert packing_for(base, batch, 4) is not None
    assert packing_for(base, same, 4) is None
    always = packing_for(replace(base, attention="packed"), same, 4)
    assert always is not None
    assert packing_for(replace(base, attention="padded"), batch, 4) is None
    assert lines_for(replace(base, attention="padded"), batch.lengths, 4) is None
    on_gpu = replace(base, device=torch.device("cuda"))
    assert packing_for(on_gpu, batch, 4) is None, "a mask of numbers costs a GPU its flash attention"
    flexible = packing_for(replace(on_gpu, capability=replace(base.capability, flex=True)), batch, 4)
    assert flexible is not None
    assert (flexible.lines, flexible.width, flexible.in_blocks) == (1, 128, True)


def test_rows_stay_whole_and_apart() -> None:
    lengths = [13, 3, 6, 10, 16, 4, 9]
    packing = pack(lengths, 5)
    assert packing is not None
    taken: set[tuple[int, int]] = set()
    for line, column, length in zip(packing.line.tolist(), packing.column.tolist(), lengths, strict=True):
        cells = {(line, column + i) for i in range(length)}
        assert not cells & taken
        assert column + length <= packing.width
        taken |= cells
    assert packing.lines * packing.width < len(lengths) * max(lengths)


def test_a_token_attends_to_the_prefix_and_to_its_own_row_before_it() -> None:
    packing = _first_fit([3, 1, 1], 4)  # row 0 and row 1 in line 0, row 2 and padding in line 1
    assert packing.lines == 2
    own = torch.tensor(
        [
            [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]],
            [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]],
        ]
    )
    expected = torch.cat([torch.ones(2, 4, 2), own], -1)[:, None].bool()
    assert torch.equal(packing.mask(2), expected)
    padded = _first_fit([2, 4], 4).mask(1)[1, 0]  # row 0 and two positions of padding
    assert padded.int().tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1]]
    assert packing.positions(5).tolist() == [[5, 6, 7, 5], [5, 5, 5, 5]]
    near = _first_fit([3, 1, 1], 4).mask(2, 3)[0, 0]  # row 0 begins at position 2, and sees 3 positions
    assert near.int().tolist() == [[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0], [1, 1, 0, 0, 0, 1]]
    assert packing.packed(torch.tensor([[7, 8, 9], [4, 0, 0], [3, 0, 0]])).tolist() == [[7, 8, 9, 4], [3, 0, 0, 0]]


def test_the_longest_rows_come_first_and_each_goes_into_the_first_line_with_room() -> None:
    packing = _first_fit([4, 9, 2, 5, 7], 10)
    assert packing.line.tolist() == [2, 0, 1, 2, 1]
    assert packing.column.tolist() == [5, 0, 7, 0, 0]
    assert (packing.lines, packing.width) == (3, 9)


def test_the_width_that_costs_least_is_taken() -> None:
    """A token costs what stands in for all other layers, and the slots that it attends to."""
    short = pack([8, 4, 4, 4, 4], 0)
    assert short is not None
    assert (short.lines, short.width) == (3, 8), "as many positions as in two lines of 12, and fewer slots for each"
    wide = pack([8, 5, 5, 5], 0)
    assert wide is not None
    assert (wide.lines, wide.width) == (2, 13)
    long = pack([2000, 1000, 1000], 0)
    assert long is not None
    assert (long.lines, long.width) == (2, 2000)
    assert pack([100, 98, 97], 0) is None, "two lines of 198 cost more than three of 100"


def test_rows_of_one_length_are_left_as_they_are() -> None:
    assert pack([7, 7, 7], 20) is None
    assert pack([30], 20) is None
