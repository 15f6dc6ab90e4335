import pytest
import torch

from kvopt.base.loading import Base
from kvopt.bench.real_states import real_states
from kvopt.cli.bench import bench_kl
from kvopt.errors import InputError
from kvopt.kernels import linear_kl


def test_states_are_repeatable_and_ordered_from_near_to_far(llama: Base) -> None:
    states = real_states(20, torch.float32, noise=(0.3, 1e-3), base=llama)
    again = real_states(20, torch.float32, noise=(0.3, 1e-3), base=llama)
    assert list(states.candidates) == ["noise 0.001", "noise 0.3", "no template"]
    assert states.reference.shape == (20, llama.geometry.hidden_size)
    assert states.gold.shape == (20,)
    kl = [float(linear_kl(c, states.reference, states.head).loss) for c in states.candidates.values()]
    assert 0 < kl[0] < 1e-2 * kl[1]
    assert kl[2] > kl[0]
    for name, candidate in states.candidates.items():
        assert torch.equal(candidate, again.candidates[name])
    rounded = real_states(20, torch.bfloat16, noise=(0.3,), base=llama)
    assert torch.equal(rounded.reference, states.reference.to(torch.bfloat16))
    assert rounded.head.weight.dtype == torch.bfloat16


def test_the_benchmark_measures_one_thing_at_a_time() -> None:
    with pytest.raises(InputError, match="give one of them"):
        bench_kl(memory=True, real=True)
