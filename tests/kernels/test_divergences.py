"""The registry of divergences: what is in the folder is known, is tested, and needs no other file to be touched."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from kvopt.kernels import KernelInputError, KLOptions, divergences
from kvopt.kernels.divergences import registry
from tests.kernels import test_linear_kl, test_rows, test_scores
from tests.kernels.cases import DIVERGENCES, errors, problem

FOLDER = Path(registry.__file__).parent

JEFFREYS = """
from kvopt.kernels.divergences.forward import Forward
from kvopt.kernels.divergences.registry import Divergence
from kvopt.kernels.divergences.reverse import Reverse


class Jeffreys(Divergence):
    title = "Jeffreys divergence"

    def exact(self, log_p, log_q):
        return Forward().exact(log_p, log_q) + Reverse().exact(log_p, log_q)

    def rows(self, ratios, want_gradient):
        q, d, moved = ratios.q, ratios.d, ratios.moved_mass()
        reverse = (q * d).sum(-1, keepdim=True)
        value = (moved * d).sum(-1)
        return value, moved + q * (d - reverse) if want_gradient else None

    def at_kl(self, kl):
        return 2 * kl
"""

JEFFREYS_TRITON = """
import triton
import triton.language as tl


@triton.jit
def summands(p, moved, d, beta):
    return moved * d, (p + moved) * d


@triton.jit
def value(kl, first, second, beta):
    return first


@triton.jit
def gradient(p, moved, d, first, second, beta):
    return moved + (p + moved) * (d - second)
"""


@pytest.fixture
def jeffreys(tmp_path, monkeypatch):
    """Two files more in the folder, and nothing else."""
    (tmp_path / "jeffreys.py").write_text(JEFFREYS)
    (tmp_path / "jeffreys_triton.py").write_text(JEFFREYS_TRITON)
    monkeypatch.setattr(divergences, "__path__", [*divergences.__path__, str(tmp_path)])
    registry.divergences.cache_clear()
    yield "jeffreys"
    registry.divergences.cache_clear()
    registry.row_functions.cache_clear()
    for name in [name for name in sys.modules if name.startswith(f"{divergences.__name__}.jeffreys")]:
        del sys.modules[name]


def test_every_formula_in_the_folder_is_registered_and_has_its_triton_functions():
    stems = {path.stem for path in FOLDER.glob("*.py")} - {"__init__", "registry"}
    assert {"forward", "reverse", "jsd"} <= set(DIVERGENCES)
    assert stems == {name + suffix for name in DIVERGENCES for suffix in ("", "_triton")}


def test_an_unregistered_name_is_refused_with_those_that_are_registered():
    with pytest.raises(KernelInputError, match="'wasserstein'; choose one of " + ", ".join(DIVERGENCES)):
        KLOptions(divergence="wasserstein")


@pytest.mark.parametrize(
    "test",
    [
        test_linear_kl.test_precision_contract_holds_from_tiny_to_large_divergence,
        test_linear_kl.test_gradcheck_in_float64,
        test_linear_kl.test_rows_are_computed_again_at_the_same_distance_whatever_the_divergence,
        test_rows.test_value_gradient_and_shift,
        test_rows.test_a_token_that_only_the_candidate_expects,
        test_scores.test_divergences_are_those_of_the_loss,
    ],
)
def test_every_registered_divergence_is_compared_with_float64(test):
    assert registered_divergences_of(test) == set(registry.divergences())


@pytest.mark.skipif(find_spec("triton") is None, reason="the triton package is optional")
def test_every_registered_divergence_is_interpreted_and_compiled():
    from tests.kernels import test_triton_compile, test_triton_interpreted

    for test in (
        test_triton_interpreted.test_divergences_from_tiny_to_large,
        test_triton_interpreted.test_softcap_with_all_that_goes_with_it,
        test_triton_interpreted.test_tokens_that_only_the_candidate_expects,
        test_triton_compile.test_row_kernel_does_not_spill,
    ):
        assert registered_divergences_of(test) == set(registry.divergences()), test


def registered_divergences_of(test) -> set[str]:
    """The divergences that a parametrised test runs for."""
    marks = [mark for mark in test.pytestmark if mark.name == "parametrize" and mark.args[0] == "divergence"]
    assert len(marks) == 1
    return set(marks[0].args[1])


@pytest.mark.parametrize("distance", [5e-4, 0.16, 1.4])
def test_two_files_add_a_divergence(jeffreys, distance):
    backends = ["torch"] + (["triton-rows"] if os.environ.get("TRITON_INTERPRET") == "1" else [])
    for backend in backends:
        options = KLOptions(divergence=jeffreys, backend=backend)
        assert options.formula.title == "Jeffreys divergence"
        e = errors(problem(distance, torch.float32, n=9, v=2100), options)
        assert e.kl <= 1e-3
        assert e.gradient <= 1e-3
    with pytest.raises(KernelInputError, match="forward, jeffreys, jsd, reverse"):
        KLOptions(divergence="wasserstein")


@pytest.mark.skipif(find_spec("triton") is None, reason="the triton package is optional")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="starts the interpreting process")
def test_two_files_add_a_divergence_to_the_triton_backend_too():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", "two_files"]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "3 passed" in run.stdout


def test_formulas_need_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from kvopt.kernels import Head, KLOptions, linear_kl\n"
        "from kvopt.kernels.divergences import divergences\n"
        "h = torch.randn(3, 4)\n"
        "for name in divergences():\n"
        "    assert linear_kl(h, h + 1, Head(torch.randn(7, 4)), options=KLOptions(name)).kl.isfinite().all()\n"
        "assert not [m for m in sys.modules if m.endswith('_triton') and m.startswith('kvopt')]\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
